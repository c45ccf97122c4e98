"""The decisions about the server: when its shards take steps, publish, take snapshots, and go back to one of them.

It is a part of `machine.ServerMachine`, and like it pure. `step_queue` decides which gradients make a step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.sharded_learner import StateLeaves
from qfleet.topologies.fleet.messages import (
    CheckValues,
    Dropped,
    LearnerFound,
    ProcessId,
    ReadLearner,
    Replied,
    Request,
    Warn,
)
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.parameter_server.requests import (
    ApplyAverages,
    ApplyGradients,
    AverageGradients,
    NewestParameters,
    Pieces,
    Publish,
    Pull,
    ResetShard,
    RestoreShard,
    Snapshot,
    TakeSnapshot,
)
from qfleet.topologies.parameter_server.stats import ServerStats
from qfleet.topologies.parameter_server.step_queue import Admission, StepBatch, StepQueue


class SavedServer(NamedTuple):
    """The learner of a checkpoint, divided over the shards."""

    target_age: int
    leaves: list[Reference[StateLeaves]]


class ShardedServer:
    """The shards of the server.

    All shards take the same steps in the same order. This holds without any agreement between them, because a process
    does what it is asked for in order, and every step is requested of all shards at once.
    """

    def __init__(self, config: TrainConfig, stats: Callable[[], ServerStats]) -> None:
        """Begins with shards that have taken no steps; `stats` returns what counts them."""
        topology = config.topology_as(ParameterServerConfig)
        self._stats = stats
        self.shards = [ProcessId("server shard", i) for i in range(topology.num_server_shards)]
        self._clips_together = len(self.shards) > 1 and config.agent.max_gradient_norm is not None
        self.queue: StepQueue[Pieces] = StepQueue(topology, config.agent.target_update_period)
        self._newest: NewestParameters | None = None
        self._num_stepping, self._version_of_steps = 0, 0
        """How many shards have yet to take the newest steps, and the version of the parameters after these steps."""
        self._snapshot_period = topology.snapshot_period_learner_steps
        self._snapshot: Snapshot | None = None
        self._next_snapshot: Snapshot | None = None
        self._num_copying = 0
        """Shards that have not been copied yet for the next snapshot."""
        self._goes_back = ("", 0)
        """While it looks for a state to go back to: the cause, and its learner steps before."""

    @property
    def is_stepping(self) -> bool:
        """Whether steps were requested that not all shards have taken yet."""
        return self._num_stepping > 0

    # --- Gradients, and the steps that apply them ---

    def push(self, gradient: Pieces, version: int, loss: float) -> tuple[Admission, list[Request]]:
        """Takes a gradient that has arrived, and requests a learner step if the gradient completes it.

        Args:
          gradient: the gradient, as workers return it.
          version: version of the parameters that it was computed with.
          loss: loss of its batch, without importance weights.
        """
        return self.queue.push(gradient, version, loss), self._request_steps()

    def _request_steps(self) -> list[Request]:
        """Requests all steps that have gathered while the shards took others. A paused run does this, too.

        There is one such request at a time. A server that falls behind thus takes several steps per request, and
        publishes the parameters once for all of them.
        """
        if self.is_stepping or (batch := self.queue.take()) is None:
            return []
        self._num_stepping, self._version_of_steps = len(self.shards), batch.version
        self._stats().learner_steps += batch.num_steps
        self._stats().num_gradients["applied"] += len(batch.gradients)
        averages, steps = self._divide(batch)
        # References to what the shards *will* return: a worker that is asked to pull them waits for the step.
        params, *target_params = zip(*(step.results for step in steps), strict=True)
        if self._newest is not None:  # otherwise the server has gone back, and the parameters are published anew
            self._newest = self._newest._replace(version=batch.version, params=params)
            if target_params:
                self._newest = self._newest._replace(target_version=batch.version, target_params=target_params[0])
        return [*averages, *steps]

    def _divide(
        self, batch: StepBatch[Pieces]
    ) -> tuple[list[AverageGradients], Sequence[ApplyGradients | ApplyAverages]]:
        """Returns the requests to all shards that make these steps: those to average first, and those to apply."""
        pieces = list(zip(self.shards, zip(*batch.gradients, strict=True), strict=True))

        def results() -> list[Reference[np.ndarray]]:
            return [Reference() for _ in range(2 if batch.updates_target else 1)]

        if not self._clips_together:
            return [], [ApplyGradients(shard, own, results=results()) for shard, own in pieces]
        # Every shard needs the norm of the whole gradient. Each averages its pieces first, and gets the squares of all
        # shards with the call that follows.
        averages = [AverageGradients(shard, own, results=[Reference()]) for shard, own in pieces]
        squared_norms = [average.results[0] for average in averages]
        return averages, [ApplyAverages(shard, squared_norms, results=results()) for shard in self.shards]

    def steps_ended(self, event: Replied | Dropped) -> list[Request]:
        """Notes that a shard has taken its steps, or that it will not.

        If a shard was lost, the server has gone back already, to a newer version than that of these steps. Otherwise a
        gradient was lost on its way, and other shards may have taken the step: the server must go back, or its shards
        would differ by a step.
        """
        requests: list[Request] = []
        if isinstance(event, Replied):
            self._stats().busy_seconds["server"] += event.reply.busy_seconds
        elif self.queue.is_current(self._version_of_steps):
            requests = self.go_back("a gradient was lost on its way to the server")
        self._num_stepping -= 1
        return [*requests, *self._request_steps()]

    # --- Parameters ---

    def ensure_published(self) -> list[Publish]:
        """Requests the parameters of all shards if there are none to pull, and nothing otherwise.

        There are none at the start, and after the server has gone back or parameters were lost on their way. Otherwise
        each learner step publishes the parameters that it makes.
        """
        if self._newest is not None:
            return []
        requests = [Publish(shard, results=[Reference(), Reference()]) for shard in self.shards]
        params, target_params = zip(*(request.results for request in requests), strict=True)
        self._newest = NewestParameters(self.queue.version, params, self.queue.version, target_params)
        return requests

    @property
    def newest(self) -> NewestParameters:
        """The newest parameters, after `ensure_published`."""
        assert self._newest is not None
        return self._newest

    def note_failed_pull(self, pull: Pull, lost: Sequence[Reference]) -> None:
        """Has the parameters published again if a worker could not pull them because they are lost."""
        if any(piece in lost for piece in (*pull.params, *pull.target_params)):
            self._newest = None

    # --- Snapshots ---

    def take_snapshot(self) -> list[TakeSnapshot]:
        """Requests a snapshot if none has been taken for `snapshot_period_learner_steps`."""
        queue, last = self.queue, self._snapshot
        is_due = last is None or queue.learner_steps - last.learner_steps >= self._snapshot_period
        if not is_due or self._next_snapshot is not None:
            return []
        self._num_copying, leaves = len(self.shards), [Reference[StateLeaves]() for _ in self.shards]
        self._next_snapshot = snapshot = Snapshot(queue.version, queue.learner_steps, queue.target_age, leaves)
        return [TakeSnapshot(shard, snapshot, results=[own]) for shard, own in zip(self.shards, leaves, strict=True)]

    def snapshot_ended(self, snapshot: Snapshot, *, is_copied: bool) -> None:
        """Notes that a shard has been copied for a snapshot, or that it will not."""
        if snapshot is not self._next_snapshot:
            return  # another shard was lost before it could be copied
        self._num_copying -= 1
        if self._num_copying and is_copied:
            return
        self._next_snapshot = None
        if is_copied and self.queue.is_current(snapshot.version):  # it may have gone back since it was asked
            self._snapshot = snapshot

    # --- Going back ---

    def go_back(self, cause: str) -> list[Request]:
        """Has all shards continue from the newest state that is available of all of them: first, looks for it."""
        self._goes_back, self._newest = (cause, self.queue.learner_steps), None
        self._stats().num_gradients["stale"] += self.queue.disown()
        return [ReadLearner() if self._snapshot is None else CheckValues(self._snapshot.leaves)]

    def snapshot_checked(self, *, is_lost: bool) -> list[Request]:
        """Goes back to the newest snapshot, unless it is lost."""
        snapshot = self._snapshot
        assert snapshot is not None
        if is_lost:
            self._snapshot = None  # the next one is taken at once
            return [ReadLearner()]
        saved = SavedServer(snapshot.target_age, snapshot.leaves)
        return [*self._continue_from(snapshot.learner_steps, saved), self._report("the newest snapshot")]

    def learner_found(self, found: LearnerFound) -> list[Request]:
        """Goes back to the newest checkpoint, or to the beginning if there is none."""
        if found.learner is not None:
            checkpoint = self._continue_from(found.learner_steps, found.learner)
            return [*checkpoint, self._report("the newest checkpoint")]
        self.queue.continue_from(0, target_age=0)
        source = "the beginning: there is neither snapshot nor checkpoint"
        return [*map(ResetShard, self.shards), self._report(source)]

    def restore(self, saved: SavedServer, learner_steps: int, version: int) -> list[RestoreShard]:
        """Has all shards continue from a checkpoint; `version` is one that no parameters have had yet."""
        self.queue.begin_at_version(version)
        return self._continue_from(learner_steps, saved)

    def _continue_from(self, learner_steps: int, saved: SavedServer) -> list[RestoreShard]:
        self.queue.continue_from(learner_steps, saved.target_age)
        version = self.queue.version
        return [RestoreShard(shard, own, version) for shard, own in zip(self.shards, saved.leaves, strict=True)]

    def restore_lost(self, request: RestoreShard) -> list[Request]:
        """Goes back again if a state was lost on its way. If the shard was lost, the server has gone back already."""
        is_current = self.queue.is_current(request.version)
        return self.go_back("the state of a shard was lost on its way") if is_current else []

    def _report(self, source: str) -> Warn:
        (cause, before), after = self._goes_back, self.queue.learner_steps
        return Warn(f"{cause}: the server goes back from learner step {before} to {after}, {source}")
