"""Equal processes learn what one process does, and none that dies, hangs or is left behind goes unnoticed."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qfleet
from qfleet.config import TOPOLOGIES, AllReduceConfig, ConfigError, RunFailed
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.all_reduce import listener, local_processes
from qfleet.topologies.all_reduce.launcher import Launcher, check_places
from qfleet.topologies.all_reduce.processes import free_port

# --- The launcher, with processes that learn nothing ---

STUB = """
import json, os, signal, subprocess, sys, time
number, report, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
attempt = len([name for name in os.listdir(folder) if name.startswith(f"{number}-")])
open(f"{folder}/{number}-{attempt}-{os.getpid()}", "w").close()

def tell(kind, **content):
    os.write(report, (json.dumps({"kind": kind, **content}) + chr(10)).encode())

def live(seconds, first=0):
    for i in range(int(seconds / 0.05)):
        tell("alive")
        if number == 0:
            tell("progress", env_steps=first + 10 * (i + 1))
        time.sleep(0.05)

def wait_for(is_it):
    while not is_it():
        tell("alive")
        time.sleep(0.05)

def have_started(num_files):  # one that ended before the others have begun would keep them from it
    return lambda: len(os.listdir(folder)) == num_files

def is_told(names):  # by files, of the test or of the processes
    return lambda: all(os.path.exists(f"{folder}/../{name}") for name in names.split())
"""


class Stubs:
    """Processes that run a few lines each. The lines may use `number`, `attempt`, and the functions of STUB."""

    def __init__(self, folder: Path, lines: str, **settings) -> None:
        self.folder, script = folder / "started", folder / "stub.py"
        self.folder.mkdir()
        script.write_text(STUB + textwrap.dedent(lines))
        self._config = AllReduceConfig(**{"num_processes": 3, "num_envs": 3, **settings})
        self.launcher = Launcher(
            self._config,
            lambda peer: [
                sys.executable, "-S", str(script), str(peer.number), str(peer.report_descriptor), str(self.folder)
            ],
            folder / "logs",
        )  # fmt: skip

    def run(self, checkpoint: int = 0) -> list[int]:
        return [message["env_steps"] for message in self.launcher.run(lambda: checkpoint)]

    def processes(self) -> list[int]:
        return [int(name.name.rsplit("-", 1)[1]) for name in self.folder.iterdir()]

    def assert_none_lives(self) -> None:
        assert self.processes()
        wait_until(lambda: not any(map(lives, self.processes())))


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_progress_is_passed_on_until_all_have_ended(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, "live(0.2)")
    assert stubs.run() == [10, 20, 30, 40]
    assert stubs.launcher.num_restarts == 0
    stubs.assert_none_lives()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 3 was killed by SIGKILL"),
        ("sys.exit(7)", "process 1 of 3 failed with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "process 1 of 3 gave no sign of life for 10 s"),
    ],
)
def test_one_that_is_lost_restarts_all_and_is_named(tmp_path: Path, caplog, lines: str, reason: str) -> None:
    lines = f"""
    if attempt == 0:
        wait_for(have_started(3))
        if number == 1:
            wait_for(is_told("now"))
            {lines}
    live(0.5 if attempt else 60)
    """
    patience = {"silence_seconds": 10} if "10 s" in reason else {}
    stubs, env_steps = Stubs(tmp_path, lines, **patience), []
    for message in stubs.launcher.run(lambda: 20):
        env_steps.append(message["env_steps"])
        if len(env_steps) == 5:
            (tmp_path / "now").touch()
    assert env_steps[-10:] == list(range(10, 110, 10))  # of the second attempt
    first = env_steps[:-10]
    assert stubs.launcher.num_restarts == 1
    assert stubs.launcher.env_steps_repeated == first[-1] - 20 >= 30
    assert reason in caplog.text and "from environment step 20" in caplog.text and "(restart 1 of 3)" in caplog.text
    assert len(stubs.processes()) == 6
    stubs.assert_none_lives()


def test_the_process_that_was_killed_is_named_and_not_those_that_fail_without_it(
    tmp_path: Path, caplog, monkeypatch
) -> None:
    lines = """
    if attempt == 0:
        wait_for(have_started(3))
        if number == 2:
            wait_for(is_told("now"))
            os.kill(os.getpid(), signal.SIGKILL)
        os.abort() if number else sys.exit(1)
    """
    stubs = Stubs(tmp_path, lines)

    class Time:
        """The launcher's, which waits for the others of a process that has ended: for as long as they take."""

        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def sleep(_: float) -> None:
            (tmp_path / "now").touch()
            wait_until(lambda: not any(map(lives, stubs.processes())))

    monkeypatch.setattr(listener, "time", Time)
    stubs.run()
    assert "process 2 of 3 was killed by SIGKILL" in caplog.text and stubs.launcher.num_restarts == 1


def test_too_many_restarts_fail_the_run(tmp_path: Path) -> None:
    lines = "wait_for(have_started(3 * attempt + 3))\nif number == 2: sys.exit(3)\nlive(60)"
    stubs = Stubs(tmp_path, lines, max_restarts=2)
    with pytest.raises(
        RunFailed, match=r"max_restarts=2 times, and process 2 of 3 failed with exit code 3; see .*logs"
    ):
        stubs.run()
    assert len(stubs.processes()) == 9
    stubs.assert_none_lives()


@pytest.mark.parametrize(("is_config", "error"), [(True, ConfigError), (False, RunFailed)])
def test_an_error_of_the_run_itself_is_raised_and_not_tried_again(tmp_path: Path, is_config, error) -> None:
    stubs = Stubs(tmp_path, f"if number == 1: tell('failed', error='it is so', is_config={is_config})\nlive(60)")
    with pytest.raises(error, match="it is so"):
        stubs.run()
    assert stubs.launcher.num_restarts == 0
    stubs.assert_none_lives()


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    lines = """
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    open(f"{folder}/worker-{child.pid}", "w").close()
    wait_for(have_started(6 * attempt + 6))
    if attempt == 0: sys.exit(1) if number == 1 else live(60)
    """
    stubs = Stubs(tmp_path, lines)
    stubs.run()
    assert len(stubs.processes()) == 12
    stubs.assert_none_lives()


def test_leaving_the_loop_ends_the_processes(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, "live(60)")
    messages = stubs.launcher.run(lambda: 0)
    next(messages)
    messages.close()
    stubs.assert_none_lives()


def test_a_request_to_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    lines = """
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    open(f"{folder}/../{number}", "w").close()
    wait_for(is_told("0 1 2"))
    while not asked: live(0.05)
    live(0.3, first=1000)
    """
    stubs = Stubs(tmp_path, lines)
    env_steps = []
    for message in stubs.launcher.run(lambda: 0):
        env_steps.append(message["env_steps"])
        if len(env_steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert env_steps[-1] == 1050
    assert stubs.launcher.num_restarts == 0
    stubs.assert_none_lives()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "host:1234"}, "coordinator and process_id must be given together"),
        ({"process_id": 0}, "coordinator and process_id must be given together"),
        ({"coordinator": "host", "process_id": 0}, "coordinator must be HOST:PORT, got host"),
        ({"ray_address": "auto", "coordinator": "host:1", "process_id": 0}, "ray_address must be given without"),
        ({"ray_address": "ray://host:1"}, "ray_address must be auto, local or HOST:PORT, got ray://host:1"),
        ({"coordinator": "host:1", "process_id": 2}, "process_id must be 0 to num_processes - 1 = 1, got 2"),
        ({"num_processes": 0}, "num_processes must be a whole number, at least 1, got 0"),
        ({"silence_seconds": 1}, "silence_seconds must be at least 5, got 1"),
        ({"num_env_workers": 20}, "num_env_workers must be at most num_envs / num_processes=16, got 20"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AllReduceConfig(**settings)


# --- GPUs: the machine needs none, because only their names matter ---


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_processes, "_jax_has_cuda", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")


def test_a_host_with_fewer_gpus_than_its_processes_want_is_refused_before_the_folder_is_made(
    gpus, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"devices_per_process=1 GPUs of its own, got 2 visible here for 4 processes, which want 4; .* "
        r"--num-processes .* CUDA_VISIBLE_DEVICES",
    ):
        qfleet.iterate(config_for(tmp_path / "run", 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "is_enough"),
    [
        ({"num_processes": 2}, True),
        ({"num_processes": 2, "devices_per_process": 2}, False),
        ({"num_processes": 8, "coordinator": "host:1", "process_id": 7}, True),  # alone on its host
        ({"num_processes": 8, "coordinator": "host:1", "process_id": 7, "devices_per_process": 3}, False),
    ],
)
def test_only_the_processes_of_this_host_count(gpus, settings: dict, is_enough: bool) -> None:
    with contextlib.nullcontext() if is_enough else pytest.raises(ConfigError, match="got 2 visible here"):
        check_places(AllReduceConfig(**settings))


@pytest.mark.parametrize(
    ("variable", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("JAX_PLATFORMS", "cpu")]
)
def test_where_gpus_are_hidden_there_may_be_any_number_of_processes_and_they_stay_hidden(
    gpus, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    check_places(AllReduceConfig(num_processes=4))
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    assert local_processes._environment(3, 4, 1)["CUDA_VISIBLE_DEVICES"] == visible


def test_each_process_sees_gpus_of_its_own(gpus) -> None:
    def seen(*arguments: int) -> str:
        return local_processes._environment(*arguments)["CUDA_VISIBLE_DEVICES"]

    assert [seen(0, 2, 1), seen(1, 2, 1)] == ["4", "GPU-7"]
    assert seen(0, 1, 2) == "4,GPU-7"
    assert seen(0, 1, 1) == "4"


# --- Processes that learn ---

SETTINGS = {"env_steps": 4096, "eval_period_env_steps": 2048, "eval_episodes": 8}


def config_for(run_dir: Path, num_processes: int, env: str = "CartPole-v1", preset: str = "pqn", **settings):
    settings = {**SETTINGS, "run_dir": str(run_dir), "silence_seconds": 120, **settings}
    return qfleet.make_config(env, preset, "all-reduce", num_processes=num_processes, **settings)


def params_of(run_dir: Path):
    return jax.tree.leaves(jax.device_get(qfleet.load(run_dir).params))


@pytest.mark.slow
def test_one_two_and_four_processes_learn_the_same(tmp_path: Path) -> None:
    alone = qfleet.make_config("CartPole-v1", "pqn", run_dir=str(tmp_path / "alone"), **SETTINGS)
    expected = qfleet.train(alone)
    for num_processes in (1, 2, 4):
        run_dir = tmp_path / str(num_processes)
        summary = qfleet.train(config_for(run_dir, num_processes))
        assert summary["stopped"] == "env steps" and summary["num_restarts"] == 0
        assert summary["learner_steps"] == expected["learner_steps"]
        for found, wanted in zip(params_of(run_dir), params_of(tmp_path / "alone"), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    """So do its replay, counters and schedules; the environments are outside the compiled program."""
    run_dir = tmp_path / "run"
    settings = {"num_envs": 8, "replay_capacity": 2000, "warmup_env_steps": 500, "batch_size": 32}
    run = qfleet.iterate(config_for(run_dir, 2, "gym:CartPole-v1", "rainbow_lite", env_steps=10**6, **settings))
    messages = iter(run)
    while next(messages).env_steps < 1024:
        pass
    messages.close()  # as leaving a loop does: the run stops in order
    first = json.loads((run_dir / "summary.json").read_text())
    assert first["stopped"] == "interrupted"
    until = first["env_steps"] + 1024
    resumed = qfleet.resume(run_dir, env_steps=until, num_processes=1)
    records = list(resumed)
    assert records[0].env_steps > first["env_steps"] and records[0].learner_steps > first["learner_steps"]
    assert resumed.summary["env_steps"] == until
    per_step = first["learner_steps"] / (first["env_steps"] - 500)
    assert resumed.summary["learner_steps"] == pytest.approx(per_step * (until - 500), rel=0.05)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["env_steps"] for line in lines]
    assert steps == sorted(steps) and len(set(steps)) == len(steps)


@pytest.mark.slow
def test_a_run_that_began_in_one_process_goes_on_as_equal_processes(tmp_path: Path) -> None:
    config = qfleet.make_config("CartPole-v1", "pqn", **SETTINGS, run_dir=str(tmp_path / "run"))
    begun = qfleet.train(config)
    topology = AllReduceConfig(num_envs=config.topology.num_envs, num_processes=2, silence_seconds=120)
    resumed = qfleet.resume(tmp_path / "run", env_steps=begun["env_steps"] + 2048, topology=topology)
    records = list(resumed)
    assert all(record.env_steps > begun["env_steps"] for record in records)
    assert resumed.summary["topology"] == "all-reduce" and resumed.summary["env_steps"] == begun["env_steps"] + 2048
    assert resumed.summary["learner_steps"] > begun["learner_steps"]


@pytest.mark.slow
def test_a_killed_process_costs_what_came_after_the_newest_checkpoint(tmp_path: Path, caplog) -> None:
    run_dir = tmp_path / "run"
    config = config_for(run_dir, 2, env_steps=10**8, checkpoint_period_seconds=0.5)
    run, checkpoints, pid = qfleet.iterate(config), Checkpoints(run_dir / "checkpoints"), None
    with contextlib.closing(iter(run)) as records:
        for progress in records:
            if pid is None and checkpoints.latest():
                pid, killed_at = peer_pid(run_dir, 1), progress.env_steps
                os.kill(pid, signal.SIGKILL)
            elif pid is not None and "was killed" in caplog.text and progress.env_steps > killed_at:
                break
    assert "process 1 of 2 was killed by SIGKILL" in caplog.text
    assert run.summary["num_restarts"] == 1 and run.summary["stopped"] == "interrupted"
    env_steps = run.summary["env_steps"]
    assert int(re.findall(r"start again from environment step (\d+)", caplog.text)[0]) > 0
    undisturbed = tmp_path / "undisturbed"
    qfleet.train(dataclasses.replace(config, env_steps=env_steps, run_dir=str(undisturbed)))
    for found, wanted in zip(params_of(run_dir), params_of(undisturbed), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def peer_pid(run_dir: Path, number: int) -> int:
    found = [pid for pid in peers_of(run_dir) if f"--process-id={number}" in command_of(pid)]
    assert len(found) == 1
    return found[0]


def peers_of(run_dir: Path) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if "qfleet.cli.peer" in command_of(pid) and str(run_dir) in command_of(pid)]


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.slow
def test_nothing_is_left_behind_when_the_launcher_is_killed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ["--topology", "all-reduce", "--num-processes", "2", "--env-steps", "100000000"]
    command = [sys.executable, "-m", "qfleet", "train", "CartPole-v1", *flags, "--run-dir", str(run_dir)]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size > 0)
        assert len(peers_of(run_dir)) == 2
        os.kill(peer_pid(run_dir, 1), signal.SIGSTOP)  # not even one that can't hear of it
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not peers_of(run_dir))


def wait_until(holds) -> None:
    """Returns once it holds; where it never does, the test's own time runs out."""
    while not holds():
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_started_by_hand_find_each_other_and_go_on_by_hand(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first_port, second_port = (free_port("127.0.0.1") for _ in range(2))

    def train_by_hand() -> list[subprocess.Popen]:
        flags = {
            "topology": "all-reduce", "num-processes": 2, "coordinator": f"127.0.0.1:{first_port}",
            "env-steps": 2048, "run-dir": run_dir,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [start("train", "CartPole-v1", *words, f"--process-id={number}") for number in (0, 1)]

    assert "after 2,048 environment steps" in outputs_of(train_by_hand())[0]
    settings = [(0, 4096), (1, 6144)]
    both = [start("resume", run_dir, f"--process-id={i}", f"--env-steps={steps}") for i, steps in settings]
    for output in outputs_of(both, code=2):
        assert "all processes must have the same env_steps, got [4096, 6144]" in output
    first = start("resume", run_dir, "--env-steps=4096")  # the first one, with its coordinator, as recorded
    second = start("resume", run_dir, "--env-steps=4096", "--process-id=1")
    assert "after 4,096 environment steps" in outputs_of([first, second])[0]
    elsewhere = [f"--coordinator=127.0.0.1:{second_port}", "--env-steps=6144", "--checkpoint=2048"]
    both = [start("resume", run_dir, f"--process-id={number}", *elsewhere) for number in (1, 0)]
    assert "after 6,144 environment steps" in outputs_of(both)[1]
    assert (run_dir / "checkpoints" / "4096.set-aside").exists()
    assert not peers_of(run_dir)


def start(*words) -> subprocess.Popen:
    command = [sys.executable, "-m", "qfleet", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outputs_of(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Returns what they print, once all have ended with the exit code."""
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


def addresses(topology: AllReduceConfig) -> tuple:
    return topology.num_processes, topology.coordinator, topology.process_id, topology.ray_address


BY_HAND = {"coordinator": "host:1", "process_id": 0}


@pytest.mark.parametrize(
    ("recorded", "given", "expected"),
    [
        (BY_HAND, {}, (2, "host:1", 0, None)),
        (BY_HAND, {"process_id": 1}, (2, "host:1", 1, None)),
        (BY_HAND, {"coordinator": "other:2"}, (2, "other:2", 0, None)),
        (BY_HAND, {"coordinator": "local", "num_processes": 1}, (1, None, None, None)),
        (BY_HAND, {"ray_address": "auto"}, (2, None, None, "auto")),
        ({"ray_address": "auto"}, {"num_processes": 4}, (4, None, None, "auto")),
        ({"ray_address": "auto"}, {"coordinator": "local"}, (2, None, None, None)),
        ({"ray_address": "auto"}, {"coordinator": "host:1", "process_id": 1}, (2, "host:1", 1, None)),
        ({}, {"coordinator": "host:1", "process_id": 3, "num_processes": 4}, (4, "host:1", 3, None)),
    ],
)
def test_a_resumed_run_is_started_as_it_was_or_as_is_said(recorded: dict, given: dict, expected: tuple) -> None:
    config = qfleet.make_config("CartPole-v1", "pqn", "all-reduce", num_processes=2, **recorded)
    assert addresses(config.topology.with_processes(given)) == expected


@pytest.mark.parametrize(
    ("topology", "given", "message"),
    [
        ("fused", {"process_id": 1}, "process_id must come with topology all-reduce, got fused; leave it out"),
        ("fused", {"coordinator": "host:1", "process_id": 1}, "coordinator and process_id must come .*leave them out"),
        ("all-reduce", {"coordinator": "host:1"}, "coordinator and process_id must be given together"),
        ("all-reduce", {"process_id": 1}, "coordinator and process_id must be given together"),
        ("all-reduce", {"coordinator": "local", "process_id": 1}, "local .* without process_id .* got 1 and None"),
        ("all-reduce", {"coordinator": "h:1", "process_id": 1, "ray_address": "auto"}, "ray_address must be given"),
    ],
)
def test_a_way_to_start_processes_that_makes_no_sense_is_refused(topology: str, given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TOPOLOGIES[topology]().with_processes(given)


def test_a_process_that_raises_ends_at_once_though_leaving_in_order_would_wait_for_the_others(tmp_path: Path) -> None:
    script = """
    import atexit, json, os, sys, time
    from qfleet.config import AllReduceConfig
    from qfleet.config.encoding import encode_topology
    import qfleet.training.peer
    from qfleet.cli import peer

    def run_peer(*arguments, **settings):
        raise ValueError("not foreseen")

    qfleet.training.peer.run_peer = run_peer
    atexit.register(time.sleep, 600)
    topology = json.dumps(encode_topology(AllReduceConfig()))
    sys.argv = ["peer", "run", "--process-id=0", f"--topology={topology}", "--coordinator=x:1", "--timeout-seconds=5"]
    sys.argv.append("--env-steps=1")
    sys.argv.append(f"--report-descriptor={os.open(os.devnull, os.O_WRONLY)}")
    peer.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "not foreseen" in done.stderr
