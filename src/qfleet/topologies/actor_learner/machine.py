"""The decisions of actor-learner: when actors act, the learner learns, and parameters are published.

`ActorLearnerMachine.handle` handles each event: a process has replied, is lost or is back. After all replies that have
come, it gets a `Turn` unless the run pauses, and `_take_turn` requests what is due. `director` carries out the
requests.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qfleet.config import ActorLearnerConfig, TrainConfig
from qfleet.core.exploration import importance_exponent_at
from qfleet.topologies.actor_learner.learner import Leaves, UpdateResult
from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.machine import FleetMachine
from qfleet.topologies.fleet.messages import (
    CallRequest,
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
    Started,
    Turn,
    Warn,
)
from qfleet.topologies.fleet.pooled_actors import PooledActor
from qfleet.topologies.fleet.rate_limiter import ROUNDS_AHEAD
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import Writer
from qfleet.topologies.fleet.sharded_replay import (
    ArrivedChunk,
    Drawn,
    Insert,
    RestoreReplay,
    SampleShare,
    SetPriorities,
)
from qfleet.topologies.fleet.stats import PoolStats

LEARNER = ProcessId("learner")


class Broadcast(NamedTuple):
    """Parameters that actors can fetch."""

    version: int
    """Increases with each broadcast, even if the learner is lost and goes back."""
    learner_steps: int
    """Learner steps after which the parameters were taken."""
    params: Reference[Leaves]
    """Their leaves."""


# --- Requests ---


@dataclasses.dataclass(frozen=True, eq=False)
class Collect(CallRequest[tuple[ChunkStats, Reference[Chunk]]]):
    """Receive parameters, and act for one chunk."""

    broadcast: Broadcast
    epsilon: float
    writer: Writer
    """Incarnation of the actor, and the number of chunks that it was asked for before."""


@dataclasses.dataclass(frozen=True, eq=False)
class Learn(CallRequest[tuple[UpdateResult, list[Reference[np.ndarray]]]]):
    """Take the learner steps of a round, and return the priorities of each share of it."""

    drawn: Drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Publish(CallRequest[tuple[int, Reference[Leaves]]]):
    """Publish the newest parameters."""


@dataclasses.dataclass(frozen=True, eq=False)
class RestoreLearner(CallRequest[None]):
    """Go on from a learner state that has taken so many learner steps."""

    learner_steps: int
    leaves: Reference[Leaves]


# --- The machine ---


class ActorLearnerStats(PoolStats):
    """What happened in the fleet since the last record."""

    def __init__(self, num_actors: int) -> None:
        super().__init__(num_actors, ("actors", "shards", "learner"))
        self.loss = self.td_error = 0.0


class ActorLearnerMachine(FleetMachine[ActorLearnerStats, PooledActor]):
    """Decides about the actors, the shards of the replay, and the learner."""

    learner_steps = 0
    version = 0

    def __init__(self, config: TrainConfig, num_batches: int) -> None:
        """Begins with processes that aren't ready; `num_batches` is the number of batches of one round."""
        self._topology, self._num_batches = config.topology_as(ActorLearnerConfig), num_batches
        pool = self._topology.actor_pool
        actors = [PooledActor(ProcessId("actor", i)) for i in range(pool.num_actors)]
        super().__init__(config, pool, num_batches, actors)
        self._is_learner_ready = self._is_publish_requested = False
        self._broadcast: Broadcast | None = None
        """The newest parameters; None if there are none yet, or if they are lost."""
        self._rounds: set[int] = set()
        """Numbers of the rounds that are under way."""
        self._arrived: list[ArrivedChunk] = []
        """Chunks that arrived in a pause, when nothing may be stored."""

    @property
    def is_busy(self) -> bool:
        """Whether anything is on its way to the learner or to a shard."""
        return bool(self._rounds) or self.replay.is_busy

    def handle(self, event: Event) -> list[Request]:
        """Takes notice of an event, and returns what to request, in this order."""
        actors, replay = self.actors.each, self.replay
        match event:
            case Started():
                return [*self.actors.begin_all(0)]
            case Restored():
                return self._restore(event)
            case Turn():
                return self._take_turn()
            case Paused():
                self.is_paused = True

            case Ready(ProcessId("actor", i)):
                actors[i].is_ready = True
            case Lost(ProcessId("actor", i)):
                return [self.actors.replace(i)]
            case Replied(Collect() as request, (stats, chunk)):
                return self._collected(request, stats, chunk)
            case Dropped(Collect() as request, lost):
                actors[request.process.number].num_chunks_under_way -= 1
                if self._broadcast is not None and self._broadcast.params in lost:  # with the node that kept them
                    self._broadcast = None

            case Lost(ProcessId("replay shard") as process):
                return [ReadReplay(process)]
            case ReplayFound():
                return self.refill_shard(event)
            case Replied(Insert() as request) | Dropped(Insert() as request):
                replay.hear(event)
                self._inserted(request.arrived, is_stored=isinstance(event, Replied) and event.reply.is_stored)
            case Replied(SampleShare() | SetPriorities() | RestoreReplay()) | Dropped(SetPriorities()):
                replay.hear(event)

            case Ready(process) if process == LEARNER:
                self._is_learner_ready = True
            case Lost(process) if process == LEARNER:
                self._is_learner_ready = self._is_publish_requested = False
                return [ReadLearner()]
            case LearnerFound():
                return self._replace_learner(event)
            case Replied(Learn() as request, (result, priorities)):
                return self._learned(request.drawn, result, priorities)
            case Dropped(Learn() as request):
                self._rounds.discard(request.drawn.number)
            case Replied(Publish(), (learner_steps, params)):
                self._is_publish_requested = False
                self.version += 1
                self._broadcast = Broadcast(self.version, learner_steps, params)
        return []

    def _take_turn(self) -> list[Request]:
        """Requests everything that is due."""
        self.is_paused = False
        arrived, self._arrived = self._arrived, []
        stored = [self.replay.store(each) for each in arrived]
        return [*stored, *self._publish(), *self._start_rounds(), *self._start_chunks()]

    # --- Chunks: from an actor to its shard ---

    def _start_chunks(self) -> list[Collect]:
        broadcast = self._broadcast
        if broadcast is None:
            return []
        return [
            Collect(self.actors.each[i].process, broadcast, self._topology.epsilon(i), writer, results=[Reference()])
            for i, writer in self.actors.next_chunks(self.learner_steps)
        ]

    def _collected(self, request: Collect, stats: ChunkStats, chunk: Reference[Chunk]) -> list[Request]:
        staleness = max(0, self.learner_steps - request.broadcast.learner_steps)
        arrived = ArrivedChunk(request.process.number, request.writer, chunk, stats, staleness)
        if self.is_paused:
            self._arrived.append(arrived)
            return []
        return [self.replay.store(arrived)]

    def _inserted(self, arrived: ArrivedChunk, *, is_stored: bool) -> None:
        self.actors.each[arrived.actor].num_chunks_under_way -= 1
        if is_stored:
            self.count_chunk(arrived.actor, arrived.stats)
            self.stats.staleness.append(arrived.staleness)
            self.note_busy("actors", arrived.stats.busy_seconds)

    # --- Rounds: from the shards to the learner, and priorities back ---

    def _start_rounds(self) -> list[Request]:
        agent, requests, env_steps = self.config.agent, list[Request](), self.actors.env_steps
        due = self.actors.rate_limiter.due(env_steps)
        while (
            len(self._rounds) < ROUNDS_AHEAD
            and self._is_learner_ready
            and self.learner_steps + self._num_batches * (len(self._rounds) + 1) <= due
        ):
            exponent = float(importance_exponent_at(agent, np.array(env_steps)))
            drawn = self.replay.draw(
                self._num_batches * agent.batch_size, exponent if agent.replay == "prioritised" else 0.0
            )
            if drawn is None:
                break
            self._rounds.add(drawn.number)
            # The learner gets references to what the shards *will* return, so it can start as soon as they have.
            requests += [*drawn.samples, Learn(LEARNER, drawn, results=[Reference() for _ in drawn.samples])]
        return requests

    def _learned(
        self, drawn: Drawn, result: UpdateResult, priorities: Sequence[Reference[np.ndarray]]
    ) -> list[Request]:
        self._rounds.discard(drawn.number)
        self.learner_steps = result.learner_steps
        self.stats.learner_steps += self._num_batches
        self.stats.loss += result.loss
        self.stats.td_error += result.td_error
        self.note_busy("learner", result.busy_seconds)
        return [*self.replay.return_priorities(drawn, priorities)]

    # --- Parameters: from the learner to the actors ---

    def _publish(self) -> list[Publish]:
        newest, period = self._broadcast, self._topology.broadcast_period_learner_steps
        is_due = newest is None or self.learner_steps >= newest.learner_steps + period
        if not is_due or self._is_publish_requested or not self._is_learner_ready:
            return []
        self._is_publish_requested = True
        return [Publish(LEARNER, results=[Reference()])]

    # --- Lost processes and checkpoints ---

    def _replace_learner(self, found: LearnerFound) -> list[Request]:
        """Has the replacement of a lost learner go on from the newest checkpoint, or from the beginning."""
        before, self.learner_steps = self.learner_steps, found.learner_steps
        requests: list[Request] = []
        origin = "from the beginning: there is no checkpoint yet"
        if found.learner is not None:
            requests.append(RestoreLearner(LEARNER, found.learner_steps, found.learner))
            origin = f"from the newest checkpoint, at learner step {found.learner_steps}"
        if self._broadcast is not None:  # otherwise no broadcast would be due before the old number of steps is reached
            self._broadcast = self._broadcast._replace(learner_steps=found.learner_steps)
        self.warm_up_if_empty()
        return [*requests, Warn(f"the learner had taken {before} steps, and goes on {origin}")]

    def _restore(self, event: Restored) -> list[Request]:
        self.learner_steps, self.version = event.learner_steps, event.version
        begin = self.go_on_from(event)
        learner = RestoreLearner(LEARNER, event.learner_steps, event.learner)
        return [learner, *self.replay.restore(event.shares, event.env_steps), *begin]
