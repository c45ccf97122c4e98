"""Equal processes on Ray learn what one process does, and none that is lost goes unnoticed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from other_processes import command_of, lives, wait_until

import qfleet
from qfleet.config import AllReduceConfig, ConfigError, FusedConfig, RunFailed
from qfleet.runtime.run_directory import RunDirectory
from qfleet.topologies.all_reduce.launcher import Launcher, check_places


def test_ray_that_is_missing_is_named_with_the_command_that_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "qfleet.topologies.fleet.cluster", raising=False)
    run_dir = tmp_path / "run"
    config = qfleet.make_config("CartPole-v1", "pqn", "all-reduce", ray_address="auto", run_dir=str(run_dir))
    with pytest.raises(ConfigError, match=r"needs Ray \(.*\); pip install 'qfleet\[ray\]'"):
        qfleet.iterate(config)
    assert not run_dir.exists()
    check_places(AllReduceConfig())  # without it, Ray isn't needed


def test_an_address_without_a_cluster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**settings):
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"ray_address must be .*, got auto \(Could not find .*`ray start --head`"):
        env_steps_of(stubs(tmp_path, ""))


# --- On a cluster of this machine alone, which the tests share ---


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that qfleet did not start, and must leave as it was."""
    ray = pytest.importorskip("ray")
    from qfleet.topologies.fleet.cluster import _init

    _init({"address": "local", "num_cpus": 4, "include_dashboard": False, "log_to_driver": False})
    yield
    assert ray.is_initialized()
    wait_until(is_free)
    ray.shutdown()


def is_free() -> bool:
    """Whether nothing of what a test had of the cluster is left."""
    import ray

    return ray.available_resources().get("CPU") == 4


STUB = """
import json, os, signal, sys, time
number, report, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
attempt = len([name for name in os.listdir(folder) if name.startswith(f"{number}-")])
open(f"{folder}/{number}-{attempt}-{os.getpid()}", "w").close()

def live(seconds, first=0):
    for i in range(int(seconds / 0.05)):
        message = {"kind": "progress", "env_steps": first + i} if number == 0 else {"kind": "alive"}
        os.write(report, (json.dumps(message) + chr(10)).encode())
        time.sleep(0.05)

def wait_for(is_it):
    while not is_it():
        os.write(report, b'{"kind": "alive"}\\n')
        time.sleep(0.05)

def have_started(num_files):  # one that ended before the others have begun would keep them from it
    return lambda: len(os.listdir(folder)) == num_files
"""


def stubs(folder: Path, lines: str, **settings) -> Launcher:
    """Returns the launcher of processes that run a few lines each. The lines may use `number` and `attempt`."""
    (folder / "stub.py").write_text(STUB + textwrap.dedent(lines))
    (folder / "started").mkdir()
    command = ["-S", str(folder / "stub.py")]
    config = AllReduceConfig(**{"ray_address": "auto", **settings})
    return Launcher(
        config,
        lambda peer: [peer.python, *command, str(peer.number), str(peer.report_descriptor), str(folder / "started")],
        folder / "logs",
    )


def env_steps_of(launcher: Launcher) -> list[int]:
    return [message["env_steps"] for message in launcher.run(lambda: 20)]  # that of the newest checkpoint


def started_in(folder: Path) -> list[int]:
    return [int(path.name.rsplit("-", 1)[1]) for path in (folder / "started").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("sys.exit(7)", "failed with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "gave no sign of life for 10 s"),
        ("os.kill(os.getppid(), signal.SIGKILL)", "was lost with its Ray actor"),
    ],
)
def test_one_that_is_lost_restarts_all_and_is_named(
    cluster, tmp_path: Path, caplog, monkeypatch, lines: str, reason: str
) -> None:
    from qfleet.topologies.all_reduce import ray_processes

    class Time:
        """Stands still for those who wait for Ray to start a process, which may take long."""

        monotonic = staticmethod(lambda: 0.0)

    monkeypatch.setattr(ray_processes, "time", Time)
    lines = f"""
    if attempt == 0:
        wait_for(have_started(2))
        if number == 1: live(0.2); {lines}
    live(0.5 if attempt else 60)
    """
    launcher = stubs(tmp_path, lines, silence_seconds=10 if "10 s" in reason else 60)
    assert env_steps_of(launcher)[-10:] == list(range(10))
    assert launcher.machine.num_restarts == 1
    assert "process 1 of 2 on " in caplog.text
    assert f"{reason}; all processes start again from environment step 20" in caplog.text
    assert len(started_in(tmp_path)) == 4
    wait_until(lambda: not any(map(lives, started_in(tmp_path))))


@pytest.mark.slow
def test_an_error_of_the_run_itself_comes_through_ray(cluster, tmp_path: Path) -> None:
    tell = "os.write(report, json.dumps({'kind': 'failed', 'error': 'it is so', 'is_config': False}).encode() + b'\\n')"
    launcher = stubs(tmp_path, f"if number == 1: {tell}\nelse: live(20)")
    with pytest.raises(RunFailed, match="it is so"):
        env_steps_of(launcher)
    wait_until(lambda: not any(map(lives, started_in(tmp_path))))


@pytest.mark.slow
def test_a_request_to_stop_comes_to_the_processes_on_ray(cluster, tmp_path: Path) -> None:
    launcher = stubs(
        tmp_path,
        """
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        open(f"{folder}/listens-{number}", "w").close()
        wait_for(have_started(4))
        while not asked: live(0.05)
        live(0.3, first=1000)
        """,
    )
    env_steps = []
    for message in launcher.run(lambda: 0):
        env_steps.append(message["env_steps"])
        if len(env_steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert env_steps[-1] == 1004 and launcher.machine.num_restarts == 0


@pytest.mark.slow
def test_the_users_modules_are_found_as_here_and_the_cores_are_shared(
    cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "module_of_the_users.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.setenv("XLA_FLAGS", "--of_the_users")
    monkeypatch.chdir(tmp_path)
    lines = """
    import module_of_the_users
    facts = [os.getcwd(), *map(os.environ.get, ["OMP_NUM_THREADS", "XLA_FLAGS"])]
    open(f"{folder}/../facts-{number}.json", "w").write(json.dumps(facts))
    live(0.1)
    """
    env_steps_of(stubs(tmp_path, lines))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    for i in range(2):
        facts = json.loads((tmp_path / f"facts-{i}.json").read_text())
        assert facts == [str(tmp_path), threads, "--of_the_users"]


@pytest.mark.slow
def test_a_cluster_without_room_is_told_what_it_lacks(cluster, tmp_path: Path) -> None:
    wait_until(is_free)  # of what the test before had
    rule = r"room for num_processes=5 times 1 CPU, got 4 CPU free of 4 CPU for 5 s"
    with pytest.raises(ConfigError, match=rule):
        env_steps_of(stubs(tmp_path, "", num_processes=5, num_envs=5, silence_seconds=5))


@pytest.mark.slow
def test_a_node_that_does_not_see_the_runs_folder_is_named(cluster, tmp_path: Path, monkeypatch) -> None:
    from qfleet.topologies.all_reduce import ray_processes

    class Elsewhere(ray_processes._ProcessActor):
        def placement(self, folder: str):
            return super().placement("/nowhere" + folder)

    monkeypatch.setattr(ray_processes, "_ProcessActor", Elsewhere)
    with pytest.raises(ConfigError, match=rf"all nodes of the Ray cluster see, got {tmp_path}, which node .* lacks"):
        env_steps_of(stubs(tmp_path, ""))


@pytest.mark.slow
def test_a_node_that_can_not_run_qfleet_is_an_error_with_its_reason(cluster, tmp_path: Path, monkeypatch) -> None:
    from qfleet.topologies.all_reduce import ray_processes

    class Lacking(ray_processes._ProcessActor):
        def __init__(self) -> None:
            raise ModuleNotFoundError("No module named 'qfleet'")

    monkeypatch.setattr(ray_processes, "_ProcessActor", Lacking)
    with pytest.raises(ConfigError, match=r"one isn't \(ModuleNotFoundError: No module named 'qfleet'\); install"):
        env_steps_of(stubs(tmp_path, ""))


# --- A Ray that the command starts and ends ---


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["its end", "SIGKILL"])
def test_processes_on_a_local_ray_learn_what_one_does_and_nothing_is_left_behind(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("ray")
    run_dir = tmp_path / "run"
    flags = ["--topology=all-reduce", "--num-processes=2", "--ray-address=local", "--silence-seconds=300"]
    env_steps = 2048 if ending == "its end" else 100_000_000
    flags += [f"--run-dir={run_dir}", f"--env-steps={env_steps}"]
    output = tmp_path / "output"
    with output.open("w") as file:
        command = [sys.executable, "-m", "qfleet", "train", "CartPole-v1", *flags]
        # In a session of its own, whose number marks all of Ray's processes.
        launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        if ending != "its end":
            wait_until(lambda: has_begun(run_dir) or launcher.poll() is not None)
            assert launcher.poll() is None, output.read_text()
            launcher.kill()
        code = launcher.wait()
    finally:
        launcher.kill()
        launcher.wait()
    assert code == (-signal.SIGKILL if ending == "SIGKILL" else 0), output.read_text()
    wait_until(lambda: not peers_of(run_dir))
    # Where Ray isn't ended in order, two helpers of its own look for the rest of it for another minute.
    helpers = ("ray::DashboardAgent", "ray::RuntimeEnvAgent") if ending == "SIGKILL" else ()
    wait_until(lambda: not [pid for pid in of_session(launcher.pid) if not in_words(pid).startswith(helpers)])
    if ending == "its end":
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["stopped"] == "env steps" and summary["num_restarts"] == 0
        assert_learns_what_one_process_does(run_dir, tmp_path / "alone")


def assert_learns_what_one_process_does(run_dir: Path, alone: Path) -> None:
    config = RunDirectory.open(run_dir).config
    topology = FusedConfig(num_envs=config.topology.num_envs)
    expected = qfleet.train(dataclasses.replace(config, topology=topology, run_dir=str(alone)))
    assert json.loads((run_dir / "summary.json").read_text())["learner_steps"] == expected["learner_steps"] > 0
    both = (jax.tree.leaves(jax.device_get(qfleet.load(path).params)) for path in (run_dir, alone))
    for found, wanted in zip(*both, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def has_begun(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def of_session(number: int) -> list[int]:
    return [pid for pid in all_processes() if lives(pid) and session_of(pid) == number]


def in_words(pid: int) -> str:
    return " ".join(command_of(pid))


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def peers_of(folder: Path) -> list[int]:
    return [pid for pid in all_processes() if "qfleet.cli.peer" in (c := command_of(pid)) and str(folder) in "".join(c)]


def all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
