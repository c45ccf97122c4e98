"""The launcher's machine, by hand: what it passes on, which loss it tells, and what follows."""

import signal
from typing import Any

import pytest

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.topologies.all_reduce.machine import (
    GATHER_SECONDS,
    MOST_SILENT_PROGRESS,
    AskToStop,
    End,
    GiveUp,
    LauncherMachine,
    PassOn,
    StartGroup,
)
from qfleet.topologies.all_reduce.processes import ProcessState
from qfleet.topologies.fleet.messages import Warn

SILENCE = 10.0


def machine_of(**settings: Any) -> LauncherMachine:
    return LauncherMachine(AllReduceConfig(silence_seconds=SILENCE, **settings), "the logs")


def states(*codes: int | None) -> dict[int, ProcessState]:
    return {i: ProcessState(f"process {i}", code, f"ended with {code}") for i, code in enumerate(codes)}


def look(
    machine: LauncherMachine, *codes: int | None, seconds: float = 0.05, ended: bool = False, stop: bool = False
) -> list[Any]:
    return machine.looked(seconds, states(*codes), have_reports_ended=ended, must_stop=stop)


def progress(env_steps: int) -> dict[str, Any]:
    return {"kind": "progress", "env_steps": env_steps}


def kinds(requests: list[Any]) -> list[type]:
    return [type(request) for request in requests]


def test_progress_is_passed_on_and_the_run_ends_once_all_have_ended_and_all_is_read():
    machine = machine_of()
    assert machine.reported(0, progress(1)) == [PassOn(progress(1))] and machine.reported(1, {"kind": "alive"}) == []
    assert look(machine, None, None) == look(machine, 0, None) == look(machine, 0, 0) == []
    assert machine.reported(0, progress(2)) == [PassOn(progress(2))]
    assert look(machine, 0, 0, ended=True) == [End()]


@pytest.mark.parametrize(("is_config", "error"), [(True, ConfigError), (False, RunFailed)])
def test_an_error_of_the_run_itself_ends_it(is_config, error):
    (end,) = machine_of().reported(1, {"kind": "failed", "error": "it is so", "is_config": is_config})
    assert type(end.error) is error and str(end.error) == "it is so"


def test_a_request_to_stop_is_passed_on_once_and_only_if_there_is_anything_to_save():
    """The processes may compile for a long time."""
    assert look(machine_of(), None, None, stop=True) == [End()]
    machine = machine_of()
    machine.reported(0, progress(1))
    assert kinds(look(machine, None, None, stop=True)) == [AskToStop]
    assert look(machine, None, None, stop=True) == []
    assert machine.left() == [], "a second request would end them before they have saved"
    by_hand = machine_of(coordinator="host:1", process_id=0)
    assert kinds(look(by_hand, None, None, stop=True)) == [AskToStop], "the other processes may have begun"


def test_a_process_that_is_asked_to_stop_may_end_by_the_signal_but_others_may_not():
    machine = machine_of()
    machine.reported(0, progress(1))
    look(machine, None, None, stop=True)
    assert look(machine, None, -signal.SIGTERM, stop=True, seconds=1.0) == []
    assert look(machine, 0, -signal.SIGTERM, stop=True) == [End()], "though the reports may not have ended"
    machine = machine_of()
    assert look(machine, 0, -signal.SIGTERM, seconds=1.0) == []
    assert kinds(look(machine, 0, -signal.SIGTERM)) == [GiveUp]


def test_the_process_that_was_killed_is_told_and_not_those_that_abort_or_fail_without_it():
    machine = machine_of()
    assert look(machine, -signal.SIGABRT, None, None, seconds=GATHER_SECONDS / 2) == []
    assert look(machine, -signal.SIGABRT, 1, None, seconds=1.0) == [], "it may have died since it was looked at"
    assert kinds(look(machine, -signal.SIGABRT, 1, -signal.SIGKILL)) == [GiveUp]
    warning, start = machine.checkpoint_found(0)
    assert warning.text.startswith("process 2 ended with -9; all processes start again") and start == StartGroup()


def test_what_a_process_reports_while_the_others_are_gathered_counts():
    machine = machine_of()
    look(machine, 1, None)
    assert machine.reported(0, progress(1)) == [PassOn(progress(1))]
    (end,) = machine.reported(1, {"kind": "failed", "error": "it is so", "is_config": False})
    assert str(end.error) == "it is so"


def test_silence_counts_from_the_last_sign_of_life_in_the_time_that_was_listened():
    machine = machine_of()
    for _ in range(20):
        machine.reported(0, {"kind": "alive"})
        assert look(machine, None, None, seconds=SILENCE / 20) == []
    machine.reported(0, {"kind": "alive"})
    assert kinds(look(machine, None, None)) == [GiveUp]
    assert machine.checkpoint_found(5)[0].text.startswith("process 1 gave no sign of life for 10 s; all")
    assert look(machine, None, None, seconds=SILENCE - 0.1) == [], "the new group has its own time"
    assert look(machine, None, 0, seconds=0.05) == [], "one that has ended need not be heard"


@pytest.mark.parametrize("first", [0, 1])
def test_a_group_that_lives_without_progress_is_lost_if_its_launcher_could_see_any(first):
    machine, lost = machine_of(), []
    for _ in range(MOST_SILENT_PROGRESS + 1):
        for i in (first, first + 1):
            machine.reported(i, {"kind": "alive"})
        running = {i: ProcessState(f"process {i}", None, "") for i in (first, first + 1)}
        lost += machine.looked(SILENCE, running, have_reports_ended=False, must_stop=False)
    assert kinds(lost) == ([GiveUp] if first == 0 else [])
    if lost:
        assert machine.checkpoint_found(0)[0].text.startswith("no process made progress for 100 s; all")


def test_restarts_are_counted_with_the_steps_that_are_repeated_and_bounded():
    machine = machine_of(max_restarts=2)
    for env_steps, checkpoint in ((100, 80), (70, 80)):  # the second group was lost before it had caught up
        machine.reported(0, progress(env_steps))
        assert kinds(machine.lost("it was lost")) == [GiveUp]
        warning, _ = machine.checkpoint_found(checkpoint)
        assert isinstance(warning, Warn)
    assert (machine.num_restarts, machine.env_steps_repeated) == (2, 20)
    assert warning.text == (
        "it was lost; all processes start again from environment step 80 and repeat 0 steps (restart 2 of 2)"
    )
    machine.lost("it was lost")
    (end,) = machine.checkpoint_found(90)
    assert str(end.error) == (
        "an all-reduce run may lose a process max_restarts=2 times, and it was lost; see the logs, then resume from "
        "environment step 90 with `qfleet resume`"
    )
    assert machine.num_restarts == 2


def test_a_group_that_is_lost_before_it_has_stopped_is_not_started_again():
    machine = machine_of()
    machine.reported(0, progress(1))
    look(machine, None, None, stop=True)
    look(machine, None, -signal.SIGKILL, stop=True, seconds=GATHER_SECONDS)
    assert kinds(look(machine, None, -signal.SIGKILL, stop=True)) == [GiveUp]
    (end,) = machine.checkpoint_found(7)
    assert isinstance(end.error, RunFailed) and str(end.error) == (
        "a run that is asked to stop must write a checkpoint, but process 1 ended with -9 before it had; resume from "
        "environment step 7 with `qfleet resume`"
    )


@pytest.mark.parametrize("codes", [(0, 0), (0, -signal.SIGKILL)])
def test_a_caller_that_leaves_waits_for_all_to_end_however_they_do_but_not_for_ever(codes):
    machine = machine_of()
    machine.reported(0, progress(1))
    look(machine, None, None, seconds=SILENCE - 1)
    assert kinds(machine.left()) == [AskToStop]
    assert machine.reported(0, progress(2)) == look(machine, None, codes[1], seconds=SILENCE) == []
    assert look(machine, *codes) == [End()]
    assert look(machine, None, 0, seconds=1.0) == [End()]
