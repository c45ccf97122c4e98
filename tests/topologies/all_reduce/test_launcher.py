"""The launcher of equal processes, tried with processes that learn nothing: it loses none, and leaves none behind."""

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from other_processes import lives, wait_until

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.topologies.all_reduce import launcher as launcher_module
from qfleet.topologies.all_reduce.launcher import Launcher

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


def test_progress_is_passed_on_until_all_have_ended(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, "live(0.2)")
    assert stubs.run() == [10, 20, 30, 40]
    assert stubs.launcher.machine.num_restarts == 0
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
    assert stubs.launcher.machine.num_restarts == 1
    assert stubs.launcher.machine.env_steps_repeated == first[-1] - 20 >= 30
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
        """The launcher's clock, which stands still until all have ended. The last waits for another one's end."""

        @staticmethod
        def monotonic() -> float:
            num_living = sum(map(lives, stubs.processes()))
            if num_living < len(stubs.processes()):
                (tmp_path / "now").touch()
            return 0.0 if num_living else time.monotonic()

    monkeypatch.setattr(launcher_module, "time", Time)
    stubs.run()
    assert "process 2 of 3 was killed by SIGKILL" in caplog.text and stubs.launcher.machine.num_restarts == 1


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
    assert stubs.launcher.machine.num_restarts == 0
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
    assert stubs.launcher.machine.num_restarts == 0
    stubs.assert_none_lives()


def test_something_else_in_place_of_the_folder_for_output_is_told(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(ConfigError, match=f"needs a folder, got {tmp_path / 'logs'} .File exists"):
        Stubs(tmp_path, "").run()
