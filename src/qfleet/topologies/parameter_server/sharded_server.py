"""The server, as the director knows it.

It sends learner steps to the shards, passes on the parameters that they publish, takes snapshots, and goes back to one
of them when a shard is lost. `step_queue` has the decisions.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.sharded_learner import ShardedLearner, StateLeaves
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.supervisor import RemoteProcess, Supervisor
from qfleet.topologies.parameter_server.remote import Pieces, PublishedAnswer, Pull, RemoteServerShard
from qfleet.topologies.parameter_server.step_queue import Admission, StepBatch, StepQueue

logger = logging.getLogger("qfleet")

T = TypeVar("T")


class NewestParameters(NamedTuple):
    """The parameters that workers pull."""

    version: int
    params: Pieces
    target_version: int
    """Version of the first parameters that had this target network."""
    target_params: Pieces


class ServerEvents(NamedTuple):
    """Functions of the director that the server calls, in the director's thread."""

    busy: Callable[[float], None]
    """Called with the seconds that a shard was at work."""
    steps_sent: Callable[[int, int], None]
    """Called when learner steps are sent to all shards: how many steps, and how many gradients in them."""
    went_back: Callable[[int], None]
    """Called when the server has gone back to an earlier state, with the number of accepted gradients it dropped."""


class _Snapshot(NamedTuple):
    """A copy of the server's state, in which all shards have taken the same steps."""

    learner_steps: int
    target_age: int
    leaves: list[Reference[StateLeaves]]
    """For each shard, its leaves."""


@dataclasses.dataclass
class _StepsInFlight:
    """Learner steps that the shards have been sent, and that not all of them have taken yet."""

    version: int
    """Version of the parameters after these steps."""
    num_shards_left: int


class ShardedServer:
    """The shards of the server. For the director's thread.

    All shards take the same steps in the same order. This holds without any agreement between them, because a process
    does what it is asked for in order, and every step is sent to all shards at once.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: ShardedLearner,
        supervisor: Supervisor,
        events: ServerEvents,
        newest_checkpoint: Callable[[], tuple[LearnerState, int] | None],
    ) -> None:
        """Has no shards yet.

        Args:
          config: config of the run.
          learner: the learner that is divided over the shards.
          supervisor: supervisor of the shards.
          events: functions of the director to call when something happens.
          newest_checkpoint: returns the learner of the newest checkpoint and its learner steps; None if there is none.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        self._learner, self._supervisor = learner, supervisor
        self._events, self._newest_checkpoint = events, newest_checkpoint
        self._clips = config.agent.max_gradient_norm is not None
        self.processes: list[RemoteProcess[RemoteServerShard]] = []
        self._queue: StepQueue[Pieces] = StepQueue(self._topology, config.agent.target_update_period)
        self._published: NewestParameters | None = None
        self._in_flight: _StepsInFlight | None = None
        self._is_snapshot_requested = False
        self._snapshot: _Snapshot | None = None

    def add(self, process: RemoteProcess[RemoteServerShard]) -> None:
        """Takes the next shard."""
        self.processes.append(process)

    @property
    def version(self) -> int:
        """Version of the newest parameters; it never decreases."""
        return self._queue.version

    @property
    def learner_steps(self) -> int:
        """Learner steps of the server's state; they decrease when it goes back."""
        return self._queue.learner_steps

    @property
    def num_pending_steps(self) -> int:
        """Steps that wait until the shards have taken those before. If there are any, newer parameters come soon."""
        return len(self._queue.pending_steps)

    @property
    def num_gradients(self) -> int:
        """Gradients that have been accepted for the next step."""
        return len(self._queue.gradients)

    @property
    def is_stepping(self) -> bool:
        """Whether the shards were sent steps that not all of them have taken yet."""
        return self._in_flight is not None

    # --- Gradients, and the steps that apply them ---

    def push(self, gradient: Pieces, version: int, loss: float) -> Admission:
        """Takes a gradient that has arrived, and sends a learner step if the gradient completes it.

        Args:
          gradient: the gradient, as workers return it.
          version: version of the parameters that it was computed with.
          loss: loss of its batch, without importance weights.
        """
        admission = self._queue.push(gradient, version, loss)
        self._send_steps()
        return admission

    def _send_steps(self) -> None:
        """Sends all steps that have gathered while the shards took others, in one request; also in a paused run.

        There is one such request at a time. A server that falls behind thus takes several steps per request, and
        publishes the parameters once for all of them.
        """
        if self.is_stepping or (batch := self._queue.take()) is None:
            return
        self._in_flight = in_flight = _StepsInFlight(batch.version, len(self.processes))
        self._events.steps_sent(batch.num_steps, len(batch.gradients))
        # References to what the shards *will* return: a worker that is asked to pull them waits for the step.
        params, *target_params = zip(*self._submit_steps(batch, in_flight), strict=True)
        if self._published is None:  # the server has gone back, and `ensure_published` will ask for the parameters
            return
        self._published = self._published._replace(version=batch.version, params=params)
        if target_params:
            self._published = self._published._replace(target_version=batch.version, target_params=target_params[0])

    def _submit_steps(self, batch: StepBatch[Pieces], in_flight: _StepsInFlight) -> list[list[Reference[np.ndarray]]]:
        """Has all shards apply gradients; returns what each will publish."""
        columns = list(zip(*batch.gradients, strict=True))
        submit = functools.partial(
            self._supervisor.submit, num_references=2 if batch.updates_target else 1,
            on_reply=functools.partial(self._steps_taken, in_flight),
            on_dropped=functools.partial(self._steps_lost, in_flight),
        )  # fmt: skip
        if len(self.processes) == 1 or not self._clips:
            return [
                submit(process, RemoteServerShard.take_steps, pieces)
                for process, pieces in zip(self.processes, columns, strict=True)
            ]
        # Every shard needs the norm of the whole gradient. Each averages its pieces first, and gets the squares of all
        # shards with the call that follows.
        squared_norms = [
            reference
            for process, pieces in zip(self.processes, columns, strict=True)
            for reference in self._supervisor.submit(
                process, RemoteServerShard.average, pieces, num_references=1, on_reply=self._has_averaged
            )
        ]
        return [submit(process, RemoteServerShard.take_clipped_steps, squared_norms) for process in self.processes]

    def _has_averaged(self, reply: tuple[float, Any]) -> None:
        self._events.busy(reply[0])

    def _steps_taken(self, in_flight: _StepsInFlight, published: PublishedAnswer) -> None:
        """Notes that a shard has taken its steps."""
        self._events.busy(published.busy_seconds)
        self._shard_ended(in_flight)

    def _steps_lost(self, in_flight: _StepsInFlight) -> None:
        """Notes that a shard will not take its steps.

        If the shard itself was lost, the server has gone back already, to a newer version than that of these steps.
        Otherwise a gradient was lost on its way, and other shards may have taken the step: the server must go back, or
        its shards would differ by a step.
        """
        if self._queue.is_current(in_flight.version):
            self.go_back("a gradient was lost on its way to the server")
        self._shard_ended(in_flight)

    def _shard_ended(self, in_flight: _StepsInFlight) -> None:
        in_flight.num_shards_left -= 1
        if not in_flight.num_shards_left:
            self._in_flight = None
            self._send_steps()

    # --- Parameters ---

    def ensure_published(self) -> None:
        """Asks the shards for their parameters if there are none to pull: at the start, and after a loss."""
        if self._published is None:
            publish = RemoteServerShard.publish_all
            published = [self._supervisor.submit(process, publish, num_references=2) for process in self.processes]
            params, target_params = zip(*published, strict=True)
            self._published = NewestParameters(self.version, params, self.version, target_params)

    @property
    def newest(self) -> NewestParameters:
        """The newest parameters, after `ensure_published`. The shards may still be computing them."""
        assert self._published is not None
        return self._published

    def note_failed_pull(self, pull: Pull) -> None:
        """Has the parameters published again if a worker could not pull them because they are lost."""
        if any(map(self._supervisor.is_lost, (*pull.params, *pull.target_params))):
            self._published = None

    # --- State ---

    def take_snapshot_if_due(self) -> None:
        """Asks for a snapshot if none has been taken for `snapshot_period_learner_steps`."""
        last = self._snapshot.learner_steps if self._snapshot else None
        is_due = last is None or self.learner_steps - last >= self._topology.snapshot_period_learner_steps
        if not is_due or self._is_snapshot_requested:
            return
        self._is_snapshot_requested = True
        version, learner_steps, target_age = self.version, self.learner_steps, self._queue.target_age

        def taken(leaves: list[Reference[StateLeaves]] | None) -> None:
            self._is_snapshot_requested = False
            if leaves is not None and self._queue.is_current(version):  # it may have gone back since it was asked
                self._snapshot = _Snapshot(learner_steps, target_age, leaves)

        self.ask_all(RemoteServerShard.saved, taken)

    def ask_all(
        self,
        method: Callable[[RemoteServerShard], Reference[T]],
        on_answer: Callable[[list[Reference[T]] | None], None],
    ) -> None:
        """Asks all shards for something, between the same two steps.

        Args:
          method: returns it.
          on_answer: called once, with what each shard has returned, or with None if any of them was lost meanwhile.
        """
        answers: dict[int, Reference[T]] = {}
        is_dropped = False

        def answered(i: int, answer: Reference[T]) -> None:
            answers[i] = answer
            if len(answers) == len(self.processes):
                on_answer([answers[i] for i in range(len(answers))])

        def dropped() -> None:
            nonlocal is_dropped
            if not is_dropped:
                is_dropped = True
                on_answer(None)

        for i, process in enumerate(self.processes):
            self._supervisor.submit(
                process, method, on_reply=functools.partial(answered, i), on_dropped=dropped, num_references=1
            )

    def shard_was_lost(self, shard: int) -> None:
        """Takes all shards back, because the one that replaces the lost shard does not have its parameters."""
        self.go_back(f"{self.processes[shard].name} was lost")

    def go_back(self, cause: str) -> None:
        """Has all shards continue from the newest state that is available of all of them."""
        before, self._published = self.learner_steps, None
        num_dropped = self._queue.disown()
        source = self._restore_newest_state()
        self._events.went_back(num_dropped)
        logger.warning(
            "%s: the server goes back from learner step %d to %d, %s", cause, before, self.learner_steps, source
        )

    def _restore_newest_state(self) -> str:
        """Restores the newest snapshot, or the newest checkpoint, or the initial state; returns which it was."""
        snapshot = self._snapshot
        if snapshot is not None and not any(map(self._supervisor.is_lost, snapshot.leaves)):
            self._queue.continue_from(snapshot.learner_steps, snapshot.target_age)
            self._submit_restore(snapshot.leaves)
            return "the newest snapshot"
        self._snapshot = None  # it is lost, and the next one is taken at once
        if newest := self._newest_checkpoint():
            learner, learner_steps = newest
            self._restore_learner(learner, learner_steps)
            return "the newest checkpoint"
        self._queue.continue_from(0, target_age=0)
        for process in self.processes:
            self._supervisor.submit(process, RemoteServerShard.reset)
        return "the beginning: there is neither snapshot nor checkpoint"

    def restore(self, learner: LearnerState, learner_steps: int, version: int) -> None:
        """Has all shards continue from a checkpoint; `version` is one that no parameters have had yet."""
        self._queue.begin_at_version(version)
        self._restore_learner(learner, learner_steps)

    def _restore_learner(self, learner: LearnerState, learner_steps: int) -> None:
        self._queue.continue_from(learner_steps, int(learner.target_age))
        self._submit_restore([Reference(leaves) for leaves in self._learner.split(learner)])

    def _submit_restore(self, leaves: Sequence[Reference[StateLeaves]]) -> None:
        version = self.version

        def lost() -> None:
            if self._queue.is_current(version):  # not if the shard was lost, for then the server has gone back already
                self.go_back("the state of a shard was lost on its way")

        for process, own in zip(self.processes, leaves, strict=True):
            self._supervisor.submit(process, RemoteServerShard.go_on_from, own, on_dropped=lost)
