"""The decisions of the parameter server: when workers act, when they compute gradients, and what the server applies.

`ServerMachine.handle` handles each event: a process has replied, is lost or is back. After each round of
replies it gets a `Turn`, and `_take_turn` requests what is due. `sharded_server` decides about the server. `director`
carries out the requests.
"""

import dataclasses

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import exploration_at, importance_exponent_at
from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.machine import FleetMachine, tell_of_loss
from qfleet.topologies.fleet.messages import (
    Dropped,
    Event,
    LearnerFound,
    Lost,
    Paused,
    ProcessId,
    ReadReplay,
    Ready,
    ReplayFound,
    Replied,
    Request,
    Restored,
    SavedShare,
    Started,
    Turn,
    ValuesChecked,
)
from qfleet.topologies.fleet.pooled_actors import PooledActor
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import EMPTY_SHARD, ShardStats
from qfleet.topologies.fleet.sharded_replay import ArrivedChunk, Insert, RestoreReplay, SampleShare, SetPriorities
from qfleet.topologies.parameter_server.requests import (
    Act,
    ActAnswer,
    ApplyAverages,
    ApplyGradients,
    AverageGradients,
    ComputeGradient,
    ComputeGradientOf,
    GradientAnswer,
    NewestParameters,
    Pull,
    RestoreShard,
    TakeSnapshot,
)
from qfleet.topologies.parameter_server.sharded_server import ShardedServer
from qfleet.topologies.parameter_server.stats import ServerStats


@dataclasses.dataclass
class PooledWorker(PooledActor):
    """What the machine knows of a worker."""

    is_learning: bool = False
    """Whether it was asked for a gradient that has not arrived yet."""
    version: int = -1
    """Version of the parameters that it is known to have."""
    target_version: int = -1
    """The same of the target network."""
    stats: ShardStats = EMPTY_SHARD
    """Contents of its own replay."""

    def next_pull(self, newest: NewestParameters) -> Pull:
        """Returns what the worker must pull to have the newest parameters: all that it isn't known to have.

        What was sent to it and not answered yet may still be lost on its way, and a later pull must not rely on it.
        """
        if self.version == newest.version:
            return Pull(newest.version)
        has_target = self.target_version == newest.target_version
        return Pull(newest.version, newest.params, () if has_target else newest.target_params)

    def has_pulled(self, newest: NewestParameters) -> None:
        """Notes that the worker has these parameters."""
        self.version, self.target_version = newest.version, newest.target_version

    def pull_all_again(self) -> None:
        """Has `next_pull` include everything, because it isn't known what the worker has."""
        self.version = self.target_version = -1

    def refill(self, share: SavedShare) -> RestoreReplay:
        """Has the worker continue with its lanes of a saved replay."""
        self.stats = EMPTY_SHARD._replace(num_transitions=share.num_transitions)
        return RestoreReplay(self.process, share.replay)


class ServerMachine(FleetMachine[ServerStats, PooledWorker]):
    """Decides about the workers, the server, and the replay if the workers share one."""

    fixed_exploration: float | None = None
    """Exploration that replaces its schedule; None for the schedule. The director sets it."""

    def __init__(self, config: TrainConfig, num_params: int) -> None:
        """Begins with processes that aren't ready; `num_params` is the number of parameters of the network."""
        self._topology = topology = config.topology_as(ParameterServerConfig)
        workers = [PooledWorker(ProcessId("worker", i)) for i in range(topology.num_workers)]
        super().__init__(config, topology.actor_pool, 1, workers)
        self.server = ShardedServer(config, lambda: self.stats)
        self.shares_replay = topology.num_replay_shards > 0
        self._gradient_bytes = {"float32": 4, "bfloat16": 2}[topology.gradient_dtype] * num_params

    @property
    def version(self) -> int:
        """Version of the newest parameters; it never decreases."""
        return self.server.queue.version

    @property
    def learner_steps(self) -> int:
        """Learner steps of the server's state; they decrease when it goes back."""
        return self.server.queue.learner_steps

    @property
    def num_transitions(self) -> int:
        """Transitions in the shared replay, or in the replays of all workers."""
        if self.shares_replay:
            return super().num_transitions
        return sum(worker.stats.num_transitions for worker in self.actors.each)

    @property
    def can_learn(self) -> bool:
        """Whether there is anything to learn from."""
        return super().can_learn if self.shares_replay else any(map(self.is_warm, self.actors.each))

    @property
    def is_busy(self) -> bool:
        """Whether anything is under way that would change what a checkpoint holds."""
        is_any_worker_busy = any(worker.num_chunks_under_way or worker.is_learning for worker in self.actors.each)
        return is_any_worker_busy or self.server.is_stepping or self.replay.is_busy

    def handle(self, event: Event) -> list[Request]:
        """Takes notice of an event, and returns what to request, in this order."""
        workers, replay, server = self.actors.each, self.replay, self.server
        match event:
            case Started():
                return [*self.actors.begin_all(0)]
            case Restored():
                return self._restore(event)
            case Turn():
                return self._take_turn()
            case Paused():
                self.is_paused = True

            case Ready(ProcessId("worker", i)):
                workers[i].is_ready = True
            case Lost(ProcessId("worker", i) as process):
                workers[i].pull_all_again()
                return [self.actors.replace(i), *([] if self.shares_replay else [ReadReplay(process)])]
            case Replied(Act() as request, answer):
                return self._acted(request, answer)
            case Dropped(Act() as request, lost):
                workers[request.process.number].num_chunks_under_way -= 1
                workers[request.process.number].pull_all_again()
                server.note_failed_pull(request.pull, lost)
            case Replied(ComputeGradient() | ComputeGradientOf() as request, answer):
                return self._gradient_arrived(request, answer)
            case Dropped(ComputeGradient() | ComputeGradientOf() as request, lost):
                workers[request.process.number].is_learning = False
                workers[request.process.number].pull_all_again()
                server.note_failed_pull(request.pull, lost)
            case Replied(RestoreReplay(process=ProcessId("worker", i)), shard_stats):
                workers[i].stats = shard_stats

            case Lost(ProcessId("replay shard") as process):
                return [ReadReplay(process)]
            case ReplayFound():
                return self.refill_shard(event) if self.shares_replay else self._refill_worker(event)
            case Replied(Insert() as request) | Dropped(Insert() as request):
                replay.hear(event)
                is_stored = isinstance(event, Replied) and event.reply.is_stored
                self._stored(request.arrived.actor, request.arrived.stats, is_stored=is_stored)
            case Replied(SampleShare() | SetPriorities() | RestoreReplay()) | Dropped(SetPriorities()):
                replay.hear(event)

            case Lost(ProcessId("server shard") as process):
                return server.go_back(f"{process.name} was lost")
            case ValuesChecked(is_lost):
                return self._went_back(server.snapshot_checked(is_lost=is_lost))
            case LearnerFound():
                return self._went_back(server.learner_found(event))
            case Replied(AverageGradients(), (busy_seconds, _)):
                self.note_busy("server", busy_seconds)
            case Replied(ApplyGradients() | ApplyAverages()) | Dropped(ApplyGradients() | ApplyAverages()):
                return server.steps_ended(event)
            case Dropped(RestoreShard() as request):
                return server.restore_lost(request)
            case Replied(TakeSnapshot() as request) | Dropped(TakeSnapshot() as request):
                server.snapshot_ended(request.snapshot, is_copied=isinstance(event, Replied))
        return []

    def _take_turn(self) -> list[Request]:
        """Requests everything that is due."""
        self.is_paused = False
        publish = self.server.ensure_published()  # first, because the other requests pass on what it publishes
        return [*publish, *self._start_chunks(), *self._start_gradients(), *self.server.take_snapshot()]

    # --- Chunks ---

    def _start_chunks(self) -> list[Act]:
        newest, requests = self.server.newest, list[Act]()
        for i, writer in self.actors.next_chunks(self.learner_steps):
            worker, exploration = self.actors.each[i], self.fixed_exploration
            if exploration is None:
                exploration = float(exploration_at(self.config.agent, np.array(self.actors.env_steps)))
            results = [Reference[Chunk]()] if self.shares_replay else []
            pull = worker.next_pull(newest)
            requests.append(Act(worker.process, newest, pull, exploration, writer, results=results))
        return requests

    def _acted(self, request: Act, answer: ActAnswer) -> list[Request]:
        i = request.process.number
        self.actors.each[i].has_pulled(request.newest)
        if answer.chunk is not None:
            return [self.replay.store(ArrivedChunk(i, request.writer, answer.chunk, answer.chunk_stats))]
        assert answer.shard_stats is not None
        self.actors.each[i].stats = answer.shard_stats
        self._stored(i, answer.chunk_stats, is_stored=True)
        return []

    def _stored(self, i: int, stats: ChunkStats, *, is_stored: bool) -> None:
        self.actors.each[i].num_chunks_under_way -= 1
        if is_stored:
            self.count_chunk(i, stats)
            self.note_busy("workers", stats.busy_seconds)

    # --- Gradients ---

    def _start_gradients(self) -> list[Request]:
        """Requests as many gradients as the replay ratio and the bound on staleness allow.

        A worker has one request for a gradient at a time. It gets its parameters with the request. The parameters of a
        second request would wait until the first gradient is finished, and by then they would be older by one step of
        every other worker.
        """
        queue, requests = self.server.queue, list[Request]()
        if queue.pending_steps:
            return []  # newer parameters will be published soon, and their gradients are less stale
        num_due_steps = self.actors.rate_limiter.due(self.actors.env_steps) - self.learner_steps
        # With at most so many in flight, a gradient that is asked for now becomes stale only if others overtake it.
        limit = min(num_due_steps, self._topology.max_staleness + 1) * self._topology.gradients_per_learner_step
        num_coming = len(queue.gradients) + sum(worker.is_learning for worker in self.actors.each)
        for i in self.actors.in_turn():
            worker = self.actors.each[i]
            if num_coming >= limit:
                break
            if worker.is_learning or not worker.is_ready or not (self.shares_replay or self.is_warm(worker)):
                continue
            if not (gradient := self._start_gradient(worker)):
                break
            requests += gradient
            self.actors.note_request(i)
            num_coming += 1
        return requests

    def is_warm(self, worker: PooledWorker) -> bool:
        """Returns whether a worker's own replay has its share of the warm-up, or half of what it can hold."""
        agent, num_workers = self.config.agent, self._topology.num_workers
        share = min(agent.warmup_env_steps, agent.replay_capacity // 2) // num_workers
        return worker.stats.num_transitions >= max(1, share - agent.n_step)

    def _start_gradient(self, worker: PooledWorker) -> list[Request]:
        """Requests a gradient of a worker; returns nothing if there is nothing to learn from."""
        agent, newest, exponent = self.config.agent, self.server.newest, 0.0
        if agent.replay == "prioritised":
            exponent = float(importance_exponent_at(agent, np.array(self.actors.env_steps)))
        pieces = [Reference[np.ndarray]() for _ in self.server.shards]
        drawn = self.replay.draw(agent.batch_size, exponent) if self.shares_replay else None
        if self.shares_replay and drawn is None:
            return []
        worker.is_learning = True
        process, pull = worker.process, worker.next_pull(newest)
        if drawn is None:
            return [ComputeGradient(process, newest, pull, exponent, results=pieces)]
        priorities = [Reference[np.ndarray]() for _ in drawn.samples]
        return [*drawn.samples, ComputeGradientOf(process, newest, pull, drawn, results=[*pieces, *priorities])]

    def _gradient_arrived(self, request: ComputeGradient | ComputeGradientOf, answer: GradientAnswer) -> list[Request]:
        worker = self.actors.each[request.process.number]
        worker.is_learning = False
        worker.has_pulled(request.newest)
        admission, steps = self.server.push(answer.pieces, request.newest.version, answer.result.unweighted_loss)
        self.stats.count_gradient(answer.result, self._gradient_bytes, admission)
        if isinstance(request, ComputeGradient):
            return steps
        return [*steps, *self.replay.return_priorities(request.drawn, answer.priorities)]

    # --- Lost processes and checkpoints ---

    def _refill_worker(self, found: ReplayFound) -> list[Request]:
        """Has a worker that was replaced continue with its lanes of the newest checkpoint, or with nothing."""
        worker, requests = self.actors.each[found.process.number], list[Request]()
        num_lost, worker.stats = worker.stats.num_transitions, EMPTY_SHARD
        if found.share is not None:
            requests.append(worker.refill(found.share))
        self.warm_up_if_empty()
        return [*requests, tell_of_loss(found, num_lost)]

    def _went_back(self, requests: list[Request]) -> list[Request]:
        """Takes notice that the server goes back to an earlier learner step."""
        self.warm_up_if_empty()
        return requests

    def _restore(self, event: Restored) -> list[Request]:
        server = self.server.restore(event.learner, event.learner_steps, event.version + 1)
        begin = self.go_on_from(event)
        if self.shares_replay:
            return [*server, *begin, *self.replay.restore(event.shares, event.env_steps)]
        shares = zip(self.actors.each, event.shares, strict=False)
        return [*server, *begin, *(worker.refill(share) for worker, share in shares)]
