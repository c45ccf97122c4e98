"""The launcher in a simulated world: groups of processes that start slowly, die, hang and stop at any time.

Launcher and machine are real. A group is a script of what its processes do and when, and the clock goes on only while
somebody waits. Everything random follows from a seed.
"""

import contextlib
import json
import math
import random
import signal
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from invariants import require
from simulated_rig import NUM_SEEDS

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.topologies.all_reduce import launcher as launcher_module
from qfleet.topologies.all_reduce.launcher import Launcher
from qfleet.topologies.all_reduce.machine import MOST_SILENT_PROGRESS
from qfleet.topologies.all_reduce.processes import ProcessLost, ProcessState

SILENCE = 10.0
FAULTS = ("killed", "exits", "falls silent", "reports an error", "makes no progress")
MOST_READS = 200_000


class World:
    """Time, the newest checkpoint, and what goes wrong."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.checkpoint = 0
        self.groups: list[Group] = []
        self.num_reads = 0
        self.fault_rate = self.random.choice((0.0, 0.3, 0.6, 1.0))
        self.num_faults = 0
        self.num_processes = self.random.choice((1, 2, 4))
        self.max_restarts = self.random.choice((0, 1, 3))
        self.stops_at, self.leaves_at = (
            self.random.uniform(0.0, 60.0) if self.random.random() < 0.4 else math.inf for _ in range(2)
        )
        if self.random.random() < 0.3:
            self.leaves_at = self.stops_at + self.random.choice((0.0, 0.5, 2.0))
        self.has_left = False
        self.pauses = self.random.choice((0.0, 0.01))
        """Probability that the caller takes long over a message."""
        self.cause_told: Callable[[], str]
        """Returns the cause of the newest loss that the launcher knows of."""

    @property
    def must_stop(self) -> bool:
        return self.now >= self.stops_at


class Process:
    """What one process does: it compiles, reports, and ends."""

    def __init__(self, group: "Group", number: int) -> None:
        world = group.world
        self.group, self.number, self.code = group, number, None
        self.begins_at = world.now + group.compiles
        self.fault = ""
        self.fails_at = self.stops_at = self.ends_at = math.inf
        self.is_silent = self.is_stuck = False
        self.said = 0
        self.unread: list[bytes] = []

    def say(self, kind: str, **content: Any) -> None:
        self.unread.append((json.dumps({"kind": kind, **content}) + "\n").encode())

    def end(self, code: int) -> None:
        """Ends, and takes the others with it unless it has finished."""
        self.code = code
        if code != 0:
            self.leave_others()

    def leave_others(self) -> None:
        """Has the others wait for it for ever, or fail because it is missing."""
        now, random = self.group.world.now, self.group.world.random
        for other in self.group.processes:
            other.is_stuck = True
            if other is not self and other.code is None and not other.fault and random.random() < 0.5:
                other.fails_at, other.fault = now + random.uniform(0.0, 0.2), "aborts"

    def live(self) -> None:
        """Does what it does in a twentieth of a second."""
        group, now = self.group, self.group.world.now
        if now >= self.ends_at and self.code is None:
            self.end(-signal.SIGKILL)
        if self.code is not None or self.is_silent:
            return
        if now >= self.fails_at:
            self.fail()
        elif now >= self.stops_at and not self.is_stuck:
            if self.number == 0:
                group.world.checkpoint = group.env_steps
            self.end(0 if now >= self.begins_at else -signal.SIGTERM)
        elif group.env_steps >= group.target:
            self.end(0)
        elif int(now) > self.said:
            self.said = int(now)
            self.say("alive")

    def fail(self) -> None:
        self.fails_at = math.inf
        if self.fault == "killed":  # which may be noticed later than what follows from it
            self.is_silent, self.ends_at = True, self.group.world.now + self.group.world.random.uniform(0.0, 0.15)
            self.leave_others()
        elif self.fault == "exits":
            self.end(7)
        elif self.fault == "aborts":
            self.end(-signal.SIGABRT)
        elif self.fault == "reports an error":
            self.say("failed", error="it is so", is_config=False)
            self.end(1)
        else:
            self.is_silent = self.fault == "falls silent"
            for other in self.group.processes:
                other.is_stuck = True


class Group:
    """All processes of one start."""

    def __init__(self, world: World) -> None:
        self.world, self.processes, self.was_killed, self.num_asked = world, list[Process](), False, 0
        self.env_steps = self.target = 0
        self.compiles = world.random.uniform(0.0, 5 * SILENCE)
        self.passed: list[int] = []
        world.groups.append(self)

    def start(self, must_stop: Callable[[], bool]) -> None:
        world, others = self.world, self.world.groups[:-1]
        require("there are never two groups at once", all(other.was_killed for other in others))
        require("restarts are bounded", len(others) <= world.max_restarts, len(others))
        require("a run that stops does not start again", not any(other.num_asked for other in others))
        world.now += world.random.uniform(0.0, 5.0)
        if must_stop() and world.random.random() < 0.5:
            raise KeyboardInterrupt  # as Ray's does
        if others and world.random.random() < 0.2 * world.fault_rate:
            world.num_faults += 1
            raise ProcessLost("a node was lost")
        self.processes = [Process(self, i) for i in range(world.num_processes)]
        self.env_steps, self.target = world.checkpoint, 400
        self.go_wrong(world.fault_rate, self.compiles + 30.0)

    def go_wrong(self, probability: float, within_seconds: float) -> None:
        """Perhaps has one of its processes fail soon."""
        world = self.world
        process = world.random.choice(self.processes)
        if world.random.random() < probability and process.code is None:
            world.num_faults += 1
            process.fault = world.random.choice(FAULTS)
            process.fails_at = world.now + world.random.uniform(0.0, within_seconds)

    def live(self) -> None:
        """Lets a twentieth of a second pass."""
        world, first = self.world, self.processes[0]
        world.now += 0.05
        if world.now >= first.begins_at and first.code is None and not first.is_stuck and self.env_steps < self.target:
            self.env_steps += 1
            first.say("progress", env_steps=self.env_steps)
            self.passed.append(self.env_steps)
            if self.env_steps % 50 == 0:
                world.checkpoint = self.env_steps
        for process in self.processes:
            process.live()

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        self.world.num_reads += 1
        require("a run always ends", self.world.num_reads < MOST_READS)
        require("a group is not read after its end", not self.was_killed)
        self.live()
        for process in self.processes:
            data = b"".join(process.unread)
            cut = self.world.random.choice((0, len(data) // 2, len(data), len(data), len(data)))
            process.unread = [data[cut:]] if data[cut:] else []
            if data[:cut]:
                yield process.number, data[:cut]

    def states(self) -> dict[int, ProcessState]:
        return {each.number: ProcessState(f"process {each.number}", each.code, each.fault) for each in self.processes}

    def reports_have_ended(self) -> bool:
        return all(process.code is not None and not process.unread for process in self.processes)

    def ask_to_stop(self) -> None:
        self.num_asked += 1
        require("a group is asked to stop once", self.num_asked == 1)
        for process in self.processes:
            process.stops_at = self.world.now + self.world.random.uniform(0.0, 3.0)
        self.go_wrong(self.world.fault_rate / 2, 3.0)

    def kill(self) -> None:
        is_lost = not self.was_killed and not self.world.has_left  # the cause of a group that is left isn't told
        if is_lost and any(process.code == -signal.SIGKILL for process in self.processes):
            require("the cause is told, and not what follows", not self.world.cause_told().endswith("aborts"))
        self.was_killed = True
        for process in self.processes:
            process.code = -signal.SIGKILL if process.code is None else process.code


def play(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    """Plays a run to its end, and returns how it ended."""
    config = AllReduceConfig(
        num_processes=world.num_processes, num_envs=world.num_processes, silence_seconds=SILENCE,
        max_restarts=world.max_restarts,
    )  # fmt: skip

    class Stop(contextlib.nullcontext):
        requested = property(lambda _: world.must_stop)

        def __enter__(self) -> Any:
            return self

    class Simulated(Launcher):
        def _open_groups(self) -> Any:
            return contextlib.nullcontext(lambda: Group(world))

    monkeypatch.setattr(launcher_module, "StopFlag", Stop)
    monkeypatch.setattr(launcher_module, "time", types.SimpleNamespace(monotonic=lambda: world.now))
    launcher = Simulated(config, lambda peer: [], folder)
    world.cause_told = lambda: launcher.machine._cause
    messages, found, error = launcher.run(lambda: world.checkpoint), list[int](), None
    try:
        for message in messages:
            found.append(message["env_steps"])
            if world.now >= world.leaves_at:
                world.has_left = True
                messages.close()
                break
            if world.random.random() < world.pauses:  # the processes go on meanwhile
                for _ in range(int(world.random.choice((1.0, 2 * MOST_SILENT_PROGRESS)) * SILENCE / 0.05)):
                    world.groups[-1].live()
    except (RunFailed, ConfigError, KeyboardInterrupt) as raised:
        error = raised
    check(world, launcher, found, error)
    return error


def check(world: World, launcher: Launcher, found: list[int], error: BaseException | None) -> None:
    """Requires what is true of every run that has ended."""
    machine, groups = launcher.machine, world.groups
    require("no process is left", all(group.was_killed for group in groups))
    require("restarts are counted", machine.num_restarts == len(groups) - 1, machine.num_restarts, len(groups))
    passed = [env_steps for group in groups for env_steps in group.passed]
    if not world.has_left and not world.must_stop and error is None and len(groups) == 1:
        require("all progress is passed on", found == passed, len(found), len(passed))
    remaining = iter(passed)
    require("progress keeps its order, and comes once", all(env_steps in remaining for env_steps in found))
    if isinstance(error, KeyboardInterrupt):
        require("only a start is interrupted", world.must_stop and not groups[-1].processes)
    elif error is not None:
        require("a run without faults does not fail", world.num_faults > 0, error)
        expected = ("it is so", "an all-reduce run may lose", "a run that is asked to stop must write a checkpoint")
        require("an error says what happened", str(error).startswith(expected), error)
        if "may lose" in str(error):
            require("all restarts were tried", machine.num_restarts == world.max_restarts)
    elif not world.has_left and world.stops_at > world.now:
        require("a run that ends well is complete", found[-1] == 400, found[-1])
    if not world.num_faults:
        require("what is healthy is not started again", machine.num_restarts == 0)
        codes = {process.code for process in groups[-1].processes}
        if world.has_left or (found and error is None):
            require("all stop by themselves", codes <= {0, -signal.SIGTERM}, codes)


def test_a_run_ends_once_with_one_group_at_a_time_whatever_goes_wrong(tmp_path: Path, monkeypatch) -> None:
    endings: dict[str, int] = {}
    for seed in range(NUM_SEEDS):
        try:
            error = play(World(seed), tmp_path, monkeypatch)
        except BaseException:
            print(f"seed {seed} failed")
            raise
        kind = "well" if error is None else str(error)[:12] or "interrupted"
        endings[kind] = endings.get(kind, 0) + 1
    assert len(endings) >= 4, endings


@pytest.mark.parametrize("seed", range(5))
def test_no_process_counts_as_silent_while_the_caller_takes_long_over_a_message(
    tmp_path: Path, monkeypatch, seed: int
) -> None:
    world = World(seed)
    world.fault_rate, world.stops_at, world.leaves_at, world.pauses = 0.0, math.inf, math.inf, 0.05
    assert play(world, tmp_path, monkeypatch) is None
    assert len(world.groups) == 1 and world.now > 5 * SILENCE
