"""The server, as the director knows it.

It sends learner steps to the shards, passes on the parameters that they publish, takes snapshots, and goes back to one
of them when a shard is lost. `step_queue` has the decisions.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.sharded_learner import ShardedLearner
from qfleet.topologies.fleet.supervisor import RemoteProcess, Supervisor, has_failed
from qfleet.topologies.parameter_server import remote
from qfleet.topologies.parameter_server.remote import ClippedStepRequest, StepRequest
from qfleet.topologies.parameter_server.step_queue import Admission, StepQueue
from qfleet.topologies.parameter_server.transport import Transport, VectorHandle, published_vectors, references_of

logger = logging.getLogger("qfleet")


class NewestParameters(NamedTuple):
    """The parameters that workers pull."""

    version: int
    params: VectorHandle
    target_version: int
    """Version of the first parameters that had this target network."""
    target_params: VectorHandle


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
    leaves: list[Any]
    """For each shard, a reference to its leaves."""


@dataclasses.dataclass
class _StepsInFlight:
    """Learner steps that the shards have been sent, and that not all of them have taken yet."""

    version: int
    """Version of the parameters after these steps."""
    num_shards_left: int
    kept: list[Any]
    """The gradients, and the leases of the buffers for the new parameters. The shards read and write there until the
    last of them has replied, so nobody else may get these buffers before."""


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
        transport: Transport,
        events: ServerEvents,
        newest_checkpoint: Callable[[], tuple[LearnerState, int] | None],
    ) -> None:
        """Has no shards yet.

        Args:
          config: config of the run.
          learner: the learner that is divided over the shards.
          supervisor: supervisor of the shards.
          transport: leases buffers for the parameters.
          events: functions of the director to call when something happens.
          newest_checkpoint: returns the learner of the newest checkpoint and its learner steps; None if there is none.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        self._learner, self._supervisor = learner, supervisor
        self._transport, self._events, self._newest_checkpoint = transport, events, newest_checkpoint
        self._clips = config.agent.max_gradient_norm is not None
        self.processes: list[RemoteProcess] = []
        self._queue: StepQueue[VectorHandle] = StepQueue(self._topology, config.agent.target_update_period)
        self._published: NewestParameters | None = None
        self._in_flight: _StepsInFlight | None = None
        self._is_snapshot_requested = False
        self._snapshot: _Snapshot | None = None

    def add(self, process: RemoteProcess) -> None:
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

    def push(self, gradient: VectorHandle, version: int, loss: float) -> Admission:
        """Takes a gradient that has arrived, and sends a learner step if the gradient completes it.

        Args:
          gradient: handle of the gradient.
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
        leases = [self._transport.lease() for _ in range(2 if batch.updates_target else 1)]
        buffers = self._transport.parameter_buffers(leases)
        self._in_flight = in_flight = _StepsInFlight(batch.version, len(self.processes), [*batch.gradients, *leases])
        self._events.steps_sent(batch.num_steps, len(batch.gradients))
        replies = [
            remote.submit_steps(
                self._supervisor, process, request,
                on_reply=functools.partial(self._steps_taken, in_flight),
                on_dropped=functools.partial(self._steps_lost, in_flight),
            )
            for process, request in zip(self.processes, self._requests(batch.gradients, buffers), strict=True)
        ]  # fmt: skip
        if self._published is None:  # the server has gone back, and `ensure_published` will ask for the parameters
            return
        # References to what the shards *will* return: a worker that pulls them now waits inside Ray for the step.
        params, target_params = published_vectors(replies, buffers, leases)
        self._published = self._published._replace(version=batch.version, params=params)
        if target_params is not None:
            self._published = self._published._replace(target_version=batch.version, target_params=target_params)

    def _requests(self, gradients: Sequence[VectorHandle], buffers: Sequence[Any]) -> list[Any]:
        """Returns what each shard is asked for, to apply these gradients."""
        columns = zip(*(gradient.pieces for gradient in gradients), strict=True)
        requests = [StepRequest(pieces, each) for pieces, each in zip(columns, buffers, strict=True)]
        if len(self.processes) == 1 or not self._clips:
            return requests
        # Every shard needs the norm of the whole gradient. Each averages its pieces first, and gets the squares of all
        # shards as references with the request that follows.
        squared_norms = tuple(
            remote.submit_averages(self._supervisor, process, request._replace(buffers=None), on_reply=self._was_busy)
            for process, request in zip(self.processes, requests, strict=True)
        )
        return [ClippedStepRequest(squared_norms, each) for each in buffers]

    def _was_busy(self, seconds: float, *_: Any) -> None:
        self._events.busy(seconds)

    def _steps_taken(self, in_flight: _StepsInFlight, seconds: float, *_: Any) -> None:
        """Notes that a shard has taken its steps."""
        self._events.busy(seconds)
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
            in_flight.kept.clear()  # no shard reads or writes there any more
            self._in_flight = None
            self._send_steps()

    # --- Parameters ---

    def ensure_published(self) -> None:
        """Asks the shards for their parameters if there are none to pull: at the start, and after a loss."""
        if self._published is None:
            published = [remote.submit_publish(self._supervisor, process) for process in self.processes]
            params, target_params = (VectorHandle(pieces, None, pieces) for pieces in zip(*published, strict=True))
            self._published = NewestParameters(self.version, params, self.version, target_params)

    @property
    def newest(self) -> NewestParameters:
        """The newest parameters, after `ensure_published`. The shards may still be computing them."""
        assert self._published is not None
        return self._published

    def note_failed_pull(self, handles: Sequence[VectorHandle]) -> None:
        """Has the parameters published again if a worker could not pull them because they are lost."""
        if any(map(has_failed, references_of(handles))):
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

        def taken(leaves: list[Any]) -> None:
            self._is_snapshot_requested = False
            if self._queue.is_current(version):  # otherwise the server has gone back since it was asked
                self._snapshot = _Snapshot(learner_steps, target_age, leaves)

        def lost() -> None:
            self._is_snapshot_requested = False

        remote.submit_to_all(remote.submit_state, self._supervisor, self.processes, on_replies=taken, on_dropped=lost)

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
        if snapshot is not None and not any(map(has_failed, snapshot.leaves)):
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
            remote.submit_reset(self._supervisor, process)
        return "the beginning: there is neither snapshot nor checkpoint"

    def restore(self, learner: LearnerState, learner_steps: int, version: int) -> None:
        """Has all shards continue from a checkpoint; `version` is one that no parameters have had yet."""
        self._queue.begin_at_version(version)
        self._restore_learner(learner, learner_steps)

    def _restore_learner(self, learner: LearnerState, learner_steps: int) -> None:
        self._queue.continue_from(learner_steps, int(learner.target_age))
        self._submit_restore(self._learner.split(learner))

    def _submit_restore(self, leaves: Sequence[Any]) -> None:
        for process, own in zip(self.processes, leaves, strict=True):
            remote.submit_restore(self._supervisor, process, own)
