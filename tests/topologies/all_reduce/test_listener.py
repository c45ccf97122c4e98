"""The listener, with a group of processes that is a script: what it passes on, and which loss it tells."""

import json
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qfleet.config import AllReduceConfig
from qfleet.topologies.all_reduce import listener as listener_module
from qfleet.topologies.all_reduce.listener import Listener
from qfleet.topologies.all_reduce.processes import ProcessLost


class ScriptedGroup:
    """In each round it yields some messages of process 0, and afterwards has some exit codes."""

    def __init__(self, rounds: list[tuple[list[dict[str, Any]], dict[int, int | None]]]) -> None:
        self.rounds, self.codes, self.num_asked = rounds, {0: None, 1: None}, 0

    def start(self, must_stop: Callable[[], bool]) -> None:
        pass

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        messages, codes = self.rounds.pop(0)
        yield 0, "".join(json.dumps(message) + "\n" for message in messages).encode()
        self.codes = codes

    def reports_have_ended(self) -> bool:
        return not self.rounds

    def exit_codes(self) -> dict[int, int | None]:
        return self.codes

    def name(self, number: int) -> str:
        return f"process {number}"

    def cause(self, number: int) -> str:
        return f"ended with {self.codes[number]}"

    def ask_to_stop(self) -> None:
        self.num_asked += 1

    def kill(self) -> None:
        pass


def progress(env_steps: int) -> dict[str, Any]:
    return {"kind": "progress", "env_steps": env_steps}


def heard(group: ScriptedGroup, *, is_stopping: bool = False) -> list[int]:
    stop: Any = types.SimpleNamespace(requested=is_stopping)
    return [message["env_steps"] for message in Listener(AllReduceConfig(), group).messages(stop)]


@pytest.mark.parametrize("is_stopping", [False, True])
def test_what_processes_report_just_before_their_end_is_passed_on(is_stopping: bool) -> None:
    ended: dict[int, int | None] = {0: 0, 1: 0}
    group = ScriptedGroup([([progress(1)], ended), ([progress(2)], ended)])
    assert heard(group, is_stopping=is_stopping) == [1, 2]
    assert group.num_asked == is_stopping


def test_a_process_that_is_asked_to_stop_may_end_by_the_signal_but_others_may_not() -> None:
    ended: dict[int, int | None] = {0: 0, 1: -signal.SIGTERM}
    running: dict[int, int | None] = {0: None, 1: None}
    rounds = [([progress(1)], running), ([], ended), ([], ended)]
    assert heard(ScriptedGroup(rounds), is_stopping=True) == [1]
    with pytest.raises(ProcessLost, match="process 1 ended with -15"):
        heard(ScriptedGroup([([], ended), ([], ended)]))


def test_a_request_to_stop_before_any_progress_is_not_waited_for() -> None:
    """The processes may compile for a long time, and have nothing to save."""
    running: dict[int, int | None] = {0: None, 1: None}
    group = ScriptedGroup([([], running), ([progress(1)], running)])
    assert heard(group, is_stopping=True) == []
    assert group.num_asked == 0


def test_the_process_that_was_killed_is_told_before_those_that_abort_without_it(monkeypatch) -> None:
    monkeypatch.setattr(listener_module, "_GATHER_SECONDS", 0.0)
    codes: dict[int, int | None] = {0: -signal.SIGABRT, 1: -signal.SIGKILL}
    with pytest.raises(ProcessLost, match="process 1 ended with -9"):
        heard(ScriptedGroup([([], {0: -signal.SIGABRT, 1: None}), ([], codes)]))
