"""Base classes of directors that carry out what a state machine decides.

They turn requests into calls, and replies into events. They read checkpoints and serve other threads. They decide
nothing.
"""

import abc
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, TypeVarTuple

import numpy as np

from qfleet.config import ActorPool
from qfleet.config.ray_topologies import RayTopologyConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fleet.director import Director
from qfleet.topologies.fleet.machine import D, FleetMachine, Machine, S
from qfleet.topologies.fleet.messages import (
    CallRequest,
    CheckValues,
    Dropped,
    Event,
    LearnerFound,
    Lost,
    Paused,
    ProcessId,
    ReadLearner,
    ReadReplay,
    Ready,
    ReplayFound,
    Replied,
    Request,
    Restored,
    SavedShare,
    Turn,
    ValuesChecked,
    Warn,
)
from qfleet.topologies.fleet.references import Reference, dump
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.remote_process import RemoteProcess
from qfleet.topologies.fleet.replay_shares import share_of

logger = logging.getLogger("qfleet")

M = TypeVar("M", bound=Machine)
F = TypeVar("F", bound=FleetMachine)
P = TypeVar("P")
R = TypeVar("R")
As = TypeVarTuple("As")


class MachineDirector(Director[D], Generic[D, M]):
    """Stands between a state machine and the processes of a run."""

    def __init__(
        self,
        topology: RayTopologyConfig,
        pool: ActorPool,
        machine: M,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
    ) -> None:
        """Starts nothing yet.

        Args:
          topology: of the run.
          pool: the processes that act, and the shards that keep their transitions.
          machine: decides.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads the replay of a checkpoint, as one replay for all shards.
        """
        self._pool, self.machine, self._read_learner, self._read_replay = pool, machine, read_learner, read_replay
        super().__init__(topology)
        self._processes: dict[ProcessId, RemoteProcess[Any]] = {}

    # --- What each topology implements ---

    @abc.abstractmethod
    def _call(self, request: CallRequest[Any]) -> None:
        """Calls, by `_submit`, the method that belongs to a request."""

    @abc.abstractmethod
    def _saved_learner(self, learner: LearnerState) -> Any:
        """Returns the learner of a checkpoint, in the form in which the machine passes it on."""

    @abc.abstractmethod
    def _make_stats(self) -> D:
        """Returns empty stats."""

    # --- For other threads ---

    @property
    def env_steps(self) -> int:
        """Environment steps taken so far."""
        return self.machine.env_steps

    @property
    def learner_steps(self) -> int:
        """Learner steps taken so far, without those that were lost since."""
        return self.machine.learner_steps

    @property
    def counters(self) -> dict[str, Any]:
        """The counts that `restore` needs in addition to the state and to the numbers of steps."""
        return self.machine.counters

    def quiesce(self) -> None:
        """Waits until nothing is under way that would change what a checkpoint holds, as `Director.quiesce` does."""
        with self._lock:  # until the base class has noted the pause, too: no turn may come in between
            self._tell(Paused())
            super().quiesce()

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Makes all processes go on from a checkpoint, before the first `resume`.

        If the checkpoint has no replay, they go on from an empty one.
        """
        replay = state.get("replay")
        event = Restored(
            counters["env_steps"],
            counters["learner_steps"],
            counters["replay_starts_at"] if replay is not None else counters["env_steps"],
            # The run that wrote the checkpoint may have had more actors, or fewer, or none.
            max(counters.get("incarnations", []), default=-1) + 1,
            counters.get("version", 0),
            self._saved_learner(state["learner"]),
            [] if replay is None else [self._saved_share(replay, i) for i in range(self._pool.num_shards)],
        )
        with self._lock:
            requests = self.machine.handle(event)  # at once, so that the counts are right from now on
        self._post(lambda: self._carry_out(requests))

    # --- What its own thread does ---

    def _new_stats(self) -> D:
        stats: D = self._make_stats()
        self.machine.stats = stats
        return stats

    def _is_busy(self) -> bool:
        return self.machine.is_busy

    def _issue(self) -> None:
        self._tell(Turn())

    def _tell(self, event: Event) -> None:
        """Tells the machine what has happened, and carries out what it requests."""
        self._carry_out(self.machine.handle(event))

    def _carry_out(self, requests: Sequence[Request]) -> None:
        for request in requests:
            match request:
                case Warn(text):
                    logger.warning("%s", text)
                case ReadLearner():
                    self._tell(self._find_learner())
                case ReadReplay(process):
                    self._tell(self._find_replay(process))
                case CheckValues(references):
                    self._tell(ValuesChecked(any(map(self._supervisor.is_lost, references))))
                case CallRequest():
                    self._call(request)

    def _submit(
        self, request: CallRequest[R], method: Callable[[P, *As], R], *arguments: *As, is_repeated: bool = False
    ) -> None:
        """Calls a method in the process of a request, whose reply is the method's; see `Supervisor.submit`."""

        def dropped() -> None:
            lost = [reference for reference in dump(arguments)[1] if self._supervisor.is_lost(reference)]
            self._tell(Dropped(request, lost))

        self._supervisor.submit(
            self._processes[request.process], method, *arguments, results=request.results,
            on_reply=lambda reply: self._tell(Replied(request, reply)), on_dropped=dropped,
            is_repeated=is_repeated,
        )  # fmt: skip

    def _start_process(
        self,
        process: ProcessId,
        kind: type,
        arguments: tuple,
        resources: Mapping[str, float],
        variables: Mapping[str, str],
        labels: Mapping[str, str],
    ) -> None:
        on_lost, on_ready = (functools.partial(self._tell, event) for event in (Lost(process), Ready(process)))
        made: RemoteProcess[Any] = self._make_process(
            process.name, kind, arguments, resources, variables, on_lost, on_ready, labels=labels
        )
        self._processes[process] = self._supervisor.add(made)

    def _find_learner(self) -> LearnerFound:
        newest = self._of_newest_checkpoint(self._read_learner)
        if newest is None:
            return LearnerFound(0, None)
        learner, counters = newest
        return LearnerFound(counters["learner_steps"], self._saved_learner(learner))

    def _find_replay(self, process: ProcessId) -> ReplayFound:
        can_read = self.machine.config.checkpoint_replay
        newest = self._of_newest_checkpoint(self._read_replay) if can_read else None
        if newest is None:
            return ReplayFound(process, None, 0)
        saved, counters = newest
        return ReplayFound(process, self._saved_share(saved, process.number), counters["env_steps"])

    def _saved_share(self, saved: SavedReplay, number: int) -> SavedShare:
        share = share_of(saved, self._pool, number)
        return SavedShare(Reference(share), self._num_transitions_in(share))

    def _num_transitions_in(self, share: SavedReplay) -> int:
        """Returns how many transitions a share of a saved replay has: here, those that can be drawn."""
        return int(np.sum(np.asarray(share.leaves) > 0))


class FleetDirector(MachineDirector[S, F], Generic[S, F]):
    """Stands between the machine of a fleet of actors and its processes."""

    @abc.abstractmethod
    def _needed(self) -> list[RemoteProcess]:
        """Returns the processes without which the run can't begin, besides an actor."""

    @property
    def version(self) -> int:
        """Version of the newest parameters that actors can fetch; it never decreases."""
        return self.machine.version

    @property
    def num_transitions(self) -> int:
        """Number of transitions that can be drawn."""
        return self.machine.num_transitions

    @property
    def num_ready_actors(self) -> int:
        """Number of actors that are ready."""
        return sum(actor.is_ready for actor in self.machine.actors.each)

    @property
    def _actors(self) -> list[RemoteProcess[Any]]:
        return [self._processes[actor.process] for actor in self.machine.actors.each]

    @property
    def _shards(self) -> list[RemoteProcess[RemoteReplayShard]]:
        return [self._processes[shard] for shard in self.machine.replay.shards]

    def _missing(self) -> RemoteProcess | None:
        missing = next((process for process in self._needed() if not process.is_ready), None)
        return missing or (None if self.num_ready_actors else self._actors[0])
