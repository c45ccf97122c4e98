"""Loggers: each gets every record in a thread of its own, and one that fails or hangs costs a warning."""

import importlib.util
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qfleet.config import ConfigError
from qfleet.runtime import loggers
from qfleet.runtime.loggers import LoggedRun, Loggers
from qfleet.runtime.trackers import make_loggers


class Noting:
    def __init__(self, fails_in: str = "", error: BaseException | None = None) -> None:
        self.seen: list[Any] = []
        self._fails_in, self._error = fails_in, error or OSError("no network")

    def _note(self, what: str, *content: Any) -> None:
        self.seen.append((what, *content))
        if what == self._fails_in:
            raise self._error

    def begin(self, run: LoggedRun) -> None:
        self._note("begin", run.resumed_at)

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        self._note("log", env_steps, dict(numbers))

    def end(self, summary: Mapping[str, Any]) -> None:
        self._note("end", dict(summary))


def run_of(path: Path) -> LoggedRun:
    return LoggedRun(path, 16 * "a", {"env": "CartPole-v1", "agent": {"discount": 0.99}}, None)


def test_a_logger_gets_every_record_in_order(tmp_path: Path) -> None:
    noting = Noting()
    all_of_them = Loggers(run_of(tmp_path), make_loggers([noting]))
    all_of_them.resume_at(50)
    for env_steps in (64, 128):
        all_of_them.write(env_steps, {"loss": 0.5})
    all_of_them.end({"stopped": "env steps"})
    all_of_them.end({})
    assert noting.seen == [
        ("begin", 50), ("log", 64, {"loss": 0.5}), ("log", 128, {"loss": 0.5}), ("end", {"stopped": "env steps"})
    ]  # fmt: skip


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit("no network")])
@pytest.mark.parametrize("place", ["begin", "log", "end"])
def test_a_logger_that_fails_costs_one_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, error: BaseException
) -> None:
    failing, noting = Noting(place, error), Noting()
    with caplog.at_level(logging.WARNING):
        all_of_them = Loggers(run_of(tmp_path), [("failing", failing), ("noting", noting)])
        for env_steps in range(3):
            all_of_them.write(env_steps, {})
        all_of_them.end({})
    assert [what for what, *_ in noting.seen] == ["begin", "log", "log", "log", "end"]
    (record,) = caplog.records
    assert "failing can't log the run any more; the run goes on" in record.getMessage()
    assert "no network" in record.getMessage()


def test_a_logger_that_hangs_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "END_SECONDS", 0.01)
    answer = threading.Event()
    hanging = Noting()
    hanging.begin = lambda run: answer.wait()  # type: ignore[method-assign, assignment, return-value]
    all_of_them = Loggers(run_of(tmp_path), [("hanging", hanging)])
    all_of_them.write(1, {})
    all_of_them.end({})  # which would otherwise wait for ever
    assert "hanging can't log the run any more" in caplog.text and "0.01 s" in caplog.text
    answer.set()
    for thread in threading.enumerate():
        if thread.name == "qfleet-hanging":
            thread.join()


HANGING = """
import concurrent.futures, sys, threading
from pathlib import Path
from qfleet.cli.main import end_process
from qfleet.runtime import loggers

place, num_records = sys.argv[1], int(sys.argv[2])
hangs = threading.Event()

def hang():
    hangs.set()
    threading.Event().wait()

class Hanging:
    # What hangs is a thread of its own, as a tracker's is, and the end of Python waits for such threads.
    def _do(self, what):
        if what == place:
            concurrent.futures.ThreadPoolExecutor().submit(hang).result()

    def begin(self, run):
        self._do("begin")

    def log(self, env_steps, numbers):
        self._do("log")

    def end(self, summary):
        self._do("end")

loggers.END_SECONDS = 0.5
loggers._MOST_WAITING = 2
every = loggers.Loggers(loggers.LoggedRun(Path("run"), "", {}, None), [("hanging", Hanging())])
for env_steps in range(num_records):
    every.write(env_steps, {})
    place == "end" or hangs.wait()
every.end({})
print("the run is complete")
sys.exit(end_process(0))
"""


@pytest.mark.parametrize(("place", "num_records"), [("begin", 1), ("log", 1), ("end", 1), ("begin", 5)])
def test_a_process_ends_although_a_tracker_hangs_for_ever(place: str, num_records: int) -> None:
    """With five records, too many wait to be written long before the end."""
    command = [sys.executable, "-c", HANGING, place, str(num_records)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)  # which would never return
    assert ended.stdout == "the run is complete\n"
    assert ended.stderr.count("hanging can't log the run any more; the run goes on") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["wandbb"], "one of wandb, mlflow, got 'wandbb'.*Did you mean wandb"),
        (["mlflow"], r"mlflow must be installed.*pip install 'qfleet\[mlflow\]'"),
        ([object()], "methods begin, log and end"),
        ("wandb", "a list"),
    ],
)
def test_what_is_no_logger_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        make_loggers(wrong)
