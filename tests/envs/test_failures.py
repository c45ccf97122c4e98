"""Environments that raise, hang, die or return NaN: they are replaced, logged and counted, and no row joins two."""

import logging
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import counters
import numpy as np
import pytest

from qfleet.config import RunFailed
from qfleet.config.errors import short
from qfleet.envs import gymnasium as backend
from qfleet.envs.conformance import Recording, record
from qfleet.envs.failures import describe, lane_seed
from qfleet.envs.host import HostLanes, LaneOptions

LENGTH = 5


def make_lanes(num_lanes: int, name: str = "counters:Counter-v0", **options: Any) -> HostLanes:
    lane_options = {key: options.pop(key) for key in list(options) if key in LaneOptions.__dataclass_fields__}
    return backend.make(name, length=LENGTH, **options).make_lanes(num_lanes, LaneOptions(**lane_options))


def zeros(rows: int, num_lanes: int) -> np.ndarray:
    return np.zeros((rows, num_lanes), np.int32)


def play(lanes: HostLanes, rows: int, num_lanes: int) -> Recording:
    try:
        return record(lanes, 0, zeros(rows, num_lanes))
    finally:
        lanes.close()


def shown_seed(lane: int, rebuilds: int) -> int:
    return lane_seed(0, lane, rebuilds) % counters.SEEDS_SHOWN


def assert_nothing_is_stitched(recorded: Recording) -> None:
    """Asserts that each step continues from the row before or starts an episode, and that failed steps pay nothing."""
    steps = recorded.observation[..., 1]
    starts = recorded.begins | recorded.failed
    np.testing.assert_array_equal(steps[1:], np.where(starts, 0, steps[:-1] + 1))
    np.testing.assert_array_equal(recorded.reward, np.where(starts, 0, steps[1:]))
    np.testing.assert_array_equal(recorded.terminated, ~starts & (steps[1:] == LENGTH))
    assert not recorded.truncated.any() and not recorded.is_overwritten


@pytest.fixture(autouse=True)
def no_process_is_left() -> Any:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_env_workers", [0, 2])
@pytest.mark.parametrize("fault", ["raise", "exit", "nan observation", "nan reward"])
def test_a_failed_environment_is_replaced_by_a_fresh_one(
    fault: str, num_env_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    lanes = make_lanes(2, fault=fault, at=7, num_env_workers=num_env_workers)
    with caplog.at_level(logging.WARNING, "qfleet"):
        recorded = play(lanes, 20, 2)
    # An episode of five steps, the start of another one and one step of it: then the environment's seventh step fails.
    np.testing.assert_array_equal(np.argwhere(recorded.failed[:, 1]).ravel(), [7, 15])
    assert_nothing_is_stitched(recorded)
    for lane in (0, 1):
        seeds = [shown_seed(lane, rebuilds) for rebuilds in (0, 1, 2)]
        np.testing.assert_array_equal(recorded.observation[:, lane, 0], np.repeat(seeds, [8, 8, 5]))
    assert len(caplog.records) == 4
    words = {
        "raise": "ValueError: out of order",
        "exit": "SystemExit: ",
        "nan observation": "must be finite",
        "nan reward": "got nan",
    }[fault]
    told = caplog.records[1].getMessage()
    assert words in told and "in lane 1" in told and f"seed {lane_seed(0, 1)}" in told and "failure 2 of 10" in told


@pytest.mark.parametrize("num_env_workers", [0, 1])
def test_one_failure_too_many_ends_the_run(num_env_workers: int) -> None:
    lanes = make_lanes(1, fault="raise", at=2, num_env_workers=num_env_workers, max_failures=2)
    with pytest.raises(
        RunFailed, match=r"max_failures=2 times, gym:counters:Counter-v0 failed 3 times, last in lane 0 .*out of order"
    ):
        play(lanes, 20, 1)


@pytest.mark.parametrize("num_env_workers", [0, 1])
def test_an_environment_that_fails_whenever_it_begins_uses_up_the_budget_at_once(num_env_workers: int) -> None:
    lanes = make_lanes(1, fault="raise in reset", num_env_workers=num_env_workers)
    with pytest.raises(RunFailed, match=r"failed 11 times, last in lane 0 .*OSError: no game today"):
        play(lanes, 1, 1)


@pytest.mark.parametrize(("fault", "message"), [("hang", "gave no answer for 5 s"), ("die", r"died \(exit code -9\)")])
def test_a_worker_that_is_lost_takes_its_lanes_and_no_others(
    fault: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = 5.0 if fault == "hang" else 60.0
    lanes = make_lanes(
        4,
        fault=fault,
        at=9,
        once=str(tmp_path / "once"),
        num_env_workers=2,
        step_timeout_seconds=seconds,
        max_failures=1,
    )
    with caplog.at_level(logging.WARNING, "qfleet"):
        recorded = play(lanes, 25, 4)
    # The lanes of the worker that came first fail once, in the same row.
    assert recorded.failed.sum() == 2 and recorded.failed[9].sum() == 2
    lost = np.flatnonzero(recorded.failed[9]).tolist()
    assert lost in ([0, 1], [2, 3])
    assert_nothing_is_stitched(recorded)
    for lane in range(4):
        before, after = shown_seed(lane, 0), shown_seed(lane, 1 if lane in lost else 0)
        np.testing.assert_array_equal(recorded.observation[:, lane, 0], np.repeat([before, after], [10, 16]))
    (warning,) = caplog.records
    assert re.search(f"in lanes {lost[0]} to {lost[1]} .*{message}.*failure 1 of 1", warning.getMessage())


@pytest.mark.parametrize("is_under_way", [False, True])
def test_a_worker_killed_from_outside_is_replaced(is_under_way: bool) -> None:
    lanes = make_lanes(2, num_env_workers=2)
    try:
        lanes.reset(0)
        for _ in range(2):
            lanes.send(zeros(1, 2)[0])
            lanes.recv()
        (victim,) = [child for child in multiprocessing.active_children() if child.name == "qfleet-envs-1"]
        if is_under_way:
            os.kill(victim.pid or 0, signal.SIGSTOP)
            lanes.send(zeros(1, 2)[0])
        os.kill(victim.pid or 0, signal.SIGKILL)
        if not is_under_way:
            victim.join()
            lanes.send(zeros(1, 2)[0])
        step = lanes.recv()
        np.testing.assert_array_equal(step.failed, [False, True])
        np.testing.assert_array_equal(step.observation, [[shown_seed(0, 0), 3], [shown_seed(1, 1), 0]])
        np.testing.assert_array_equal(step.reward, [3, 0])
    finally:
        lanes.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_workers_leave_signals_to_their_parent(number: signal.Signals) -> None:
    """A signal to the whole process group, as from `timeout` or Ctrl-C, must not look like a failure."""
    lanes = make_lanes(1, num_env_workers=1)
    try:
        lanes.reset(0)
        (worker,) = [child for child in multiprocessing.active_children() if child.name == "qfleet-envs-0"]
        os.kill(worker.pid or 0, number)
        for _ in range(2):
            lanes.send(zeros(1, 1)[0])
            assert not lanes.recv().failed.any()
    finally:
        lanes.close()


def test_a_worker_that_always_dies_ends_the_run() -> None:
    lanes = make_lanes(1, fault="die", num_env_workers=1, max_failures=1)
    with pytest.raises(RunFailed, match=r"failed 2 times, last in lane 0 .*died"):
        play(lanes, 9, 1)


def test_a_vector_environment_that_fails_is_replaced_as_a_whole() -> None:
    lanes = make_lanes(3, "counters:VectorCounter-v0", fault="raise", at=7)
    recorded = play(lanes, 20, 3)
    np.testing.assert_array_equal(np.argwhere(recorded.failed.all(1)).ravel(), [7, 15])
    assert recorded.failed.sum() == 6
    assert_nothing_is_stitched(recorded)


def test_closing_twice_is_harmless_and_leaves_no_process() -> None:
    lanes = make_lanes(2, fault="hang", num_env_workers=2)
    lanes.reset(0)
    lanes.send(zeros(1, 2)[0])  # this step hangs, and closing must not wait for it
    lanes.close()
    lanes.close()


def test_an_error_that_can_not_say_what_it_is_is_described_by_its_type() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe(Mute()) == "Mute: its message can't be shown"
    assert short(Mute()) == "Mute: its message can't be shown"
