"""Drives a director in a simulated world, and holds it to what must always be true.

The base class is for all topologies. A test plays many seeds: `play` makes a world and a rig, lets faults happen, and
then wants to see progress, a quiet end, and sometimes a checkpoint from which another director goes on.
"""

import abc
import collections
import concurrent.futures
import functools
import os
import unittest.mock
from collections.abc import Callable
from typing import Any

from fleet_simulator import SimulatedProcess, World
from invariants import require
from simulated_faults import FAULTS, Fault

from qfleet.config import TrainConfig
from qfleet.topologies.base import StateIsLost
from qfleet.topologies.fleet.director import Director
from qfleet.topologies.fleet.remote_process import RemoteProcess

MOST_EVENTS = 20_000
"""Number of events within which whatever is waited for must happen."""

NUM_SEEDS = int(os.environ.get("QFLEET_TEST_SEEDS", "600"))
"""Seeds that the tests play for each topology."""


class _Lock:
    """The lock of a director. Who waits for it lets the world go on; there is only one thread."""

    def __init__(self, world: World) -> None:
        self._world, self.last_event = world, 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait(self, _: float) -> None:
        require("nothing waits for ever", self._world.num_events < self.last_event)
        self._world.step()


class Rig(abc.ABC):
    """A director in a world."""

    director: Any

    def __init__(self, world: World, config: TrainConfig) -> None:
        """Makes a director and starts its processes; `resume` is yet to be called."""
        self.world, self.config = world, config
        self.checkpoint: tuple[dict[str, Any], dict[str, Any]] | None = None
        """State and counters of the newest checkpoint."""
        self.version = 0
        self.under_way: collections.Counter[Any] = collections.Counter()
        """Calls that the supervisor has not heard of yet, by method, and by process and method."""
        self._start()

    # --- What each topology has ---

    @abc.abstractmethod
    def make_director(self) -> Director:
        """Returns a director that has started nothing, and sets what the models of its processes need."""

    @abc.abstractmethod
    def check(self) -> None:
        """Requires all that is true at any time."""

    @abc.abstractmethod
    def check_at_rest(self) -> None:
        """Requires all that is true when nothing is under way."""

    @abc.abstractmethod
    def saved(self) -> tuple[int, dict[str, Any]]:
        """Returns the learner steps and the state of a checkpoint, of a director that is quiet."""

    @abc.abstractmethod
    def progress(self) -> tuple[int, ...]:
        """Returns counts all of which grow as long as nothing goes wrong."""

    # --- Driving ---

    def _start(self) -> None:
        world, self.director = self.world, self.make_director()
        director = self.director
        director._lock = self._lock = _Lock(world)
        director._make_process = functools.partial(SimulatedProcess, world)
        director._of_newest_checkpoint = self._of_newest_checkpoint
        director._wait_for = self._wait_for
        world.on_turn = self.turn
        director._supervisor.open(world, world, world.clock)
        with unittest.mock.patch("ray.cluster_resources", dict):
            director._start_processes()

    def turn(self) -> None:
        """Does what the director's thread does in one turn of its loop."""
        self.director._supervisor.process_replies()
        self.director._ask()
        self.count_calls()
        self.check()

    def resume(self) -> None:
        """Lets the director go on."""
        self.director.resume(until_env_steps=0)

    def quiesce(self) -> bool:
        """Has the director come to rest; returns False if that is impossible because a process finds no node."""
        self._lock.last_event = self.world.num_events + MOST_EVENTS
        try:
            self.director.quiesce()
        except StateIsLost:
            return False
        require("quiesce ends with nothing under way", not self.director._is_busy())
        return True

    def save(self) -> bool:
        """Takes a checkpoint of a quiet director; returns False if part of the state is lost."""
        self._lock.last_event = self.world.num_events + MOST_EVENTS
        env_steps = self.director.env_steps
        try:
            learner_steps, state = self.saved()
        except StateIsLost:
            return False
        steps = {"env_steps": env_steps, "learner_steps": learner_steps}
        self.checkpoint = state, {**self.director.counters, **steps}
        return True

    def start_again(self) -> None:
        """Has another director go on from the checkpoint, as after the loss of the computer with the first one."""
        assert self.checkpoint is not None
        for host in self.world.hosts:
            host.die(is_heard=False)
        self.world.take()
        state, counters = self.checkpoint
        self._start()
        self.director.restore(state, counters)
        self.director._ask()
        self.version = counters.get("version", 0)
        self.count_calls()
        self.check()

    def count_calls(self) -> None:
        """Counts the calls that the supervisor has not heard of yet."""
        self.under_way = collections.Counter()
        for process in self.director._supervisor._processes:
            for call in process.calls:
                self.under_way[call.method] += 1
                self.under_way[process, call.method] += 1

    def _of_newest_checkpoint(self, read: Callable[..., Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.checkpoint is None:
            return None
        state, counters = self.checkpoint
        found = read(state, None)
        return None if found is None else (found, counters)

    def _wait_for(self, answer: concurrent.futures.Future, processes: list[RemoteProcess]) -> Any:
        while not answer.done():
            self.director._check_have_places(processes)
            self._lock.wait(0.0)
        return answer.result()

    # --- What holds in every topology ---

    def check_version(self, version: int) -> None:
        """Requires that versions never go back."""
        require("versions never go back", version >= self.version, version, self.version)
        self.version = version

    def wait_for_progress(self, most_events: int = MOST_EVENTS) -> None:
        """Requires that all counts grow."""
        before = self.progress()
        self.world.run(
            lambda: all(new > old for new, old in zip(self.progress(), before, strict=True)),
            most_events, "nothing waits for ever",
        )  # fmt: skip


def make_world(seed: int) -> World:
    """Returns a world on one machine or on several nodes, in which times are spread little or much."""
    is_one_machine = seed % 2 == 0
    return World(
        seed, is_one_machine=is_one_machine, num_nodes=1 if is_one_machine else 3, spread=(0.1, 0.5, 1.5)[seed % 3]
    )


def play(make_rig: Callable[[World], Rig], seed: int) -> Rig:
    """Plays one seed: with faults, then without, then to rest, and then perhaps from a checkpoint."""
    world = make_world(seed)
    random = world.random
    rig = make_rig(world)
    rig.resume()
    for _ in range(random.choice((1, 1, 1, 2))):
        for kind in random.choices(FAULTS, k=random.randrange(5)):
            if not (kind == "a node leaves" and world.is_one_machine):
                world.after(random.uniform(0.0, 15.0), functools.partial(Fault(kind).happen, world))
        world.run_for(random.uniform(0.0, 10.0))
        if random.random() < 0.5:
            if rig.quiesce():
                rig.save()
                world.run_for(random.choice((0.0, 5.0)))
            rig.resume()
        world.run_for(10.0)
        world.starved_until = 0.0
        rig.wait_for_progress()
        if rig.quiesce():
            rig.check_at_rest()
        if rig.checkpoint is not None and random.random() < 0.3:
            rig.start_again()
        rig.resume()
        rig.wait_for_progress()
    return rig


def play_all(make_rig: Callable[[World], Rig], num_seeds: int = NUM_SEEDS, first: int = 0) -> int:
    """Plays many seeds, and prints the seed of a failure; returns the number of events."""
    num_events = 0
    for seed in range(first, first + num_seeds):
        try:
            num_events += play(make_rig, seed).world.num_events
        except BaseException:
            print(f"seed {seed} failed; play(..., {seed}) replays it")
            raise
    return num_events
