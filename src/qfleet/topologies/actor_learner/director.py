"""The director of actor-learner: it coordinates the actors, the shards of the replay, and the learner.

This file asks actors for chunks and the learner for rounds, and hands on references to what they return. The base class
`fleet/actors_director.py` decides whose turn it is, and `fleet/sharded_replay.py` is the director's view of the replay.
The methods that it calls are those of the classes in `remote` and `fleet/remote.py`.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.config import ActorLearnerConfig, TrainConfig
from qfleet.core.exploration import importance_exponent_at
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.actor_learner.learner import UpdateResult
from qfleet.topologies.actor_learner.remote import Leaves, RemoteActor, RemoteLearner
from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.actors_director import ActorsDirector, PooledActor, PoolStats
from qfleet.topologies.fleet.rate_limiter import ROUNDS_AHEAD
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.replay_shard import Writer
from qfleet.topologies.fleet.sharded_replay import Drawn, ShardedReplay
from qfleet.topologies.fleet.supervisor import IN_LINE, ONE_CPU, RemoteProcess, default_resources

logger = logging.getLogger("qfleet")


class ActorLearnerStats(PoolStats):
    """What happened in the fleet since the last record."""

    def __init__(self, num_actors: int) -> None:
        super().__init__(num_actors, ("actors", "shards", "learner"))
        self.loss = self.td_error = 0.0


class _Broadcast(NamedTuple):
    """Parameters that actors can fetch."""

    version: int
    """Increases with each broadcast, even if the learner is lost and goes back."""
    learner_steps: int
    """Learner steps after which the parameters were taken."""
    params: Reference[Leaves] | None
    """Their leaves; None if they are lost."""


class _Chunk(NamedTuple):
    """A chunk on its way to its shard."""

    actor: int
    writer: Writer
    rows: Reference[Chunk]
    stats: ChunkStats
    staleness: int
    """Learner steps between the parameters that acted and the newest, when the chunk arrived."""


class ActorLearnerDirector(ActorsDirector[ActorLearnerStats, PooledActor]):
    """Coordinates the actors, the shards of the replay, and the learner."""

    _needs_in_words = "the learner, all shards of the replay and an actor"
    _resource_flags = "--actor-resources or --learner-resources"

    def __init__(
        self,
        config: TrainConfig,
        num_batches: int,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          num_batches: of one round.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads the replay of a checkpoint, as one replay for all shards.
        """
        topology = config.topology_as(ActorLearnerConfig)
        self._topology, self._num_batches, self._read_learner = topology, num_batches, read_learner
        super().__init__(
            config, topology.actor_pool, num_batches, read_replay, ray_address=topology.ray_address,
            silence_seconds=topology.silence_seconds, max_restarts=topology.max_restarts,
        )  # fmt: skip
        note_busy = functools.partial(self._note_busy, "shards")
        self._replay: ShardedReplay = ShardedReplay(config.seed, self._pool, self._supervisor, note_busy)
        self._broadcast: _Broadcast | None = None
        self._is_broadcast_asked = False
        self._rounds: set[int] = set()
        """Numbers of the rounds that are under way."""
        self._arrived: list[_Chunk] = []
        """Chunks that arrived while the director was paused, when nothing may be stored."""

    @property
    def version(self) -> int:
        """Version of the newest parameters that actors can fetch."""
        return self._broadcast.version if self._broadcast else 0

    @property
    def num_transitions(self) -> int:
        """Number of transitions that the replay holds."""
        return self._replay.num_transitions

    def params(self) -> tuple[int, list[np.ndarray]]:
        """Returns what `GlobalLearner.params` returns, as soon as there is a learner."""
        return self._value_of(self._learner, RemoteLearner.saved_params)

    def learner_state(self) -> tuple[int, list[np.ndarray]]:
        """Returns what `GlobalLearner.state` returns.

        Raises:
          StateIsLost: if the learner is lost, and its replacement finds no node.
        """
        return self._value_of(self._learner, RemoteLearner.saved, gives_up=True)

    def snapshots(self) -> Iterator[SavedReplay]:
        """Yields what each shard of the replay keeps, and so holds only one at a time in this process.

        Raises:
          StateIsLost: if a shard is lost, and its replacement finds no node.
        """
        for process in self._replay.processes:
            yield self._value_of(process, RemoteReplayShard.saved, gives_up=True)

    def _new_stats(self) -> ActorLearnerStats:
        return ActorLearnerStats(self._topology.num_actors)

    def _resources(self) -> list[Mapping[str, float]]:
        topology = self._topology
        each: Mapping[str, float] = topology.actor_resources or ONE_CPU
        return [each] * (topology.num_actors + topology.num_replay_shards) + [topology.learner_resources or ONE_CPU]

    def _missing(self) -> RemoteProcess | None:
        missing = next((process for process in self._vital() if not process.is_ready), None)
        return missing or (None if self.num_ready_actors else self._actors[0].process)

    def _vital(self) -> list[RemoteProcess]:
        return [self._learner, *self._replay.processes]

    def _is_busy(self) -> bool:
        return bool(self._rounds) or self._replay.is_busy

    def _issue(self) -> None:
        arrived, self._arrived = self._arrived, []
        for chunk in arrived:
            self._store(chunk)
        self._issue_broadcast()
        self._issue_rounds()
        self._issue_chunks()

    # --- Actors and their chunks ---

    def _issue_chunks(self) -> None:
        if self._broadcast is not None and self._broadcast.params is not None:
            super()._issue_chunks()

    def _ask_for_chunk(self, i: int, writer: Writer) -> None:
        actor, broadcast = self._actors[i], self._broadcast
        assert broadcast is not None and broadcast.params is not None
        params = broadcast.params

        def arrived(reply: tuple[ChunkStats, Reference[Chunk]]) -> None:
            stats, rows = reply
            staleness = max(0, self.learner_steps - broadcast.learner_steps)
            chunk = _Chunk(i, writer, rows, stats, staleness)
            if self._is_paused or self._arrived:  # behind those that wait, because an actor's chunks keep their order
                self._arrived.append(chunk)
            else:
                self._store(chunk)

        def lost() -> None:
            actor.num_chunks -= 1
            newest = self._broadcast
            if newest is not None and newest.params is params and self._supervisor.is_lost(params):
                self._broadcast = newest._replace(params=None)  # the node that kept them has left the cluster

        self._supervisor.submit(
            actor.process, RemoteActor.fetch_and_collect, broadcast.version, params, self._topology.epsilon(i),
            on_reply=arrived, num_references=1, on_dropped=lost,
        )  # fmt: skip

    def _store(self, chunk: _Chunk) -> None:
        actor = self._actors[chunk.actor]

        def gone() -> None:
            actor.num_chunks -= 1

        self._replay.store(chunk.actor, chunk.writer, chunk.rows, functools.partial(self._count_chunk, chunk), gone)

    def _count_chunk(self, chunk: _Chunk) -> None:
        """Counts a chunk that the replay has stored."""
        self._count(chunk.actor, chunk.stats)
        self._stats.staleness.append(chunk.staleness)
        self._note_busy("actors", chunk.stats.busy_seconds)

    # --- The learner and its rounds ---

    def _issue_rounds(self) -> None:
        agent, size = self._config.agent, self._num_batches * self._config.agent.batch_size
        due = self.rate_limiter.due(self.env_steps)
        while (
            len(self._rounds) < ROUNDS_AHEAD
            and self._learner.is_ready
            and self.learner_steps + self._num_batches * (len(self._rounds) + 1) <= due
        ):
            exponent = float(importance_exponent_at(agent, np.array(self.env_steps)))
            drawn = self._replay.draw(size, exponent if agent.replay == "prioritised" else 0.0)
            if drawn is None:
                return
            self._rounds.add(drawn.number)
            self._supervisor.submit(
                self._learner, RemoteLearner.learn_round, drawn.places, drawn.references,
                num_references=len(drawn.references), on_reply=functools.partial(self._learned, drawn),
                on_dropped=functools.partial(self._rounds.discard, drawn.number),
            )  # fmt: skip

    def _learned(self, drawn: Drawn, reply: tuple[UpdateResult, list[Reference[np.ndarray]]]) -> None:
        stats, (result, priorities) = self._stats, reply
        self._rounds.discard(drawn.number)
        self.learner_steps = result.learner_steps
        stats.learner_steps += self._num_batches
        stats.loss += result.loss
        stats.td_error += result.td_error
        self._note_busy("learner", result.busy_seconds)
        self._replay.return_priorities(drawn, priorities)

    def _issue_broadcast(self) -> None:
        newest = self._broadcast
        period = self._topology.broadcast_period_learner_steps
        is_due = newest is None or newest.params is None or self.learner_steps >= newest.learner_steps + period
        if not is_due or self._is_broadcast_asked or not self._learner.is_ready:
            return
        self._is_broadcast_asked = True

        def published(reply: tuple[int, Reference[Leaves]]) -> None:
            self._is_broadcast_asked = False
            learner_steps, params = reply
            version = self._broadcast.version + 1 if self._broadcast else 1
            self._broadcast = _Broadcast(version, learner_steps, params)

        self._supervisor.submit(self._learner, RemoteLearner.publish, num_references=1, on_reply=published)

    def _learner_is_lost(self) -> None:
        self._is_broadcast_asked = False
        before, self.learner_steps = self.learner_steps, 0
        origin = "from the beginning: there is no checkpoint yet"
        if newest := self._of_newest_checkpoint(self._read_learner):
            learner, counters = newest
            self.learner_steps = counters["learner_steps"]
            self._give_learner(learner)
            origin = f"from the newest checkpoint, at learner step {self.learner_steps}"
        if self._broadcast is not None:  # otherwise no broadcast would be due before the old number of steps is reached
            self._broadcast = self._broadcast._replace(learner_steps=self.learner_steps)
        self._warm_up_if_empty()
        logger.warning("the learner had taken %d steps, and goes on %s", before, origin)

    def _give_learner(self, state: LearnerState) -> None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        self._supervisor.submit(self._learner, RemoteLearner.go_on_from, self.learner_steps, Reference(leaves))

    def _start_processes(self) -> None:
        topology, make, add = self._topology, self._make_process, self._supervisor.add
        resources = dict(topology.learner_resources) or default_resources(topology.mesh.num_devices)
        actor_resources = dict(topology.actor_resources) or ONE_CPU
        environment = {} if resources.get("GPU") else {"JAX_PLATFORMS": "cpu"}
        lost: Callable[[], None] = self._learner_is_lost
        self._learner = add(make("learner", RemoteLearner, (self._config,), resources, environment, lost))
        for i in range(topology.num_replay_shards):
            name, lost = f"replay shard {i}", functools.partial(self._shard_is_lost, i)
            self._replay.add(add(make(name, RemoteReplayShard, (self._config, i), actor_resources, IN_LINE, lost)))
        for i in range(topology.num_actors):
            name, lost = f"actor {i}", functools.partial(self._actor_is_lost, i)
            self._actors.append(
                PooledActor(add(make(name, RemoteActor, (self._config, i), actor_resources, IN_LINE, lost)))
            )
            self._begin(i, 0)

    def _restore_processes(self, state: dict[str, Any], incarnation: int, version: int) -> None:
        # This only keeps the version. No actor is asked for a chunk before the next broadcast.
        self._broadcast = _Broadcast(version, self.learner_steps, None)
        self._give_learner(state["learner"])
        self._replay.resume_at(self.env_steps)
        if "replay" in state:
            for i in range(len(self._replay.processes)):
                self._replay.give(i, state["replay"])
        for i in range(len(self._actors)):
            self._begin(i, incarnation)
