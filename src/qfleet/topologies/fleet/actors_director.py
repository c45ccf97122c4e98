"""Base class of directors that drive a pool of actors: it asks the actors for chunks in turn, as many as are due."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from qfleet.config import ActorPool, TrainConfig
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fleet.actor import Actor, ChunkStats
from qfleet.topologies.fleet.director import Director, DirectorStats
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD, RateLimiter
from qfleet.topologies.fleet.replay_shard import Writer
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.supervisor import RemoteProcess


class PoolStats(DirectorStats):
    """What happened in a pool of actors since the last record."""

    def __init__(self, num_actors: int, groups: tuple[str, ...]) -> None:
        """Begins with nothing.

        Args:
          num_actors: in the pool.
          groups: names of the groups of processes whose busy time is measured.
        """
        super().__init__()
        self.env_steps = self.learner_steps = self.num_failures = 0
        self.actor_env_steps = np.zeros(num_actors, np.int64)
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.q_mean: list[float] = []
        self.staleness: list[int] = []
        self.received_bytes = 0
        """Parameters received by all actors."""
        self.busy_seconds = dict.fromkeys(groups, 0.0)
        """Time that the processes of each group have worked, summed over them."""


@dataclasses.dataclass
class PooledActor:
    """What a director knows about an actor."""

    process: RemoteProcess
    num_chunks: int = 0
    """Chunks that the actor was asked for and that are not in the replay yet."""
    num_asked: int = 0
    """Chunks that the current incarnation of the actor was asked for."""
    asked_last: int = 0
    """Time of the last request to the actor, counted in requests to all actors."""


S = TypeVar("S", bound=PoolStats)
A = TypeVar("A", bound=PooledActor)


class ActorsDirector(Director[S], Generic[S, A]):
    """Coordinates actors, the replay that keeps what they do, and the processes that learn from it."""

    _replay: ShardedReplay | None
    """The replay that the actors share; None if each has its own."""

    def __init__(
        self,
        config: TrainConfig,
        pool: ActorPool,
        num_batches: int,
        read_replay: Callable[[Checkpoints, int], SavedReplay],
        *,
        ray_address: str,
        silence_seconds: float,
        max_restarts: int,
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          pool: the actors.
          num_batches: learner steps of one round.
          read_replay: reads the replay of a checkpoint, as one replay for all shards.
          ray_address: as in `Director`.
          silence_seconds: as in `Director`.
          max_restarts: as in `Director`.
        """
        self._config, self._pool, self._read_replay = config, pool, read_replay
        super().__init__(ray_address, silence_seconds, max_restarts)
        self.rate_limiter = RateLimiter(config, pool, num_batches)
        self.incarnations = [0] * pool.num_actors
        """For each actor, the number of actors that held its place before."""
        self._actors: list[A] = []
        self._num_requests = 0

    @abc.abstractmethod
    def _ask_for_chunk(self, i: int, writer: Writer) -> None:
        """Asks actor `i`, which is ready, for the chunk that `writer` numbers."""

    @abc.abstractmethod
    def _restore_processes(self, state: dict[str, Any], incarnation: int, version: int) -> None:
        """Makes all processes go on from a checkpoint.

        Args:
          state: of the checkpoint.
          incarnation: for all actors; no actor has had it before.
          version: newest version of the parameters that any actor may have seen.
        """

    # --- For other threads ---

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Makes all processes go on from a checkpoint, before the first `resume`.

        If the checkpoint has no replay, they go on from an empty one.
        """
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps
        self.rate_limiter.resume(starts_at, self.env_steps, self.learner_steps)
        # The run that wrote the checkpoint may have had more actors, or fewer, or none.
        incarnation = max(counters.get("incarnations", []), default=-1) + 1
        self._post(lambda: self._restore_processes(state, incarnation, counters.get("version", 0)))

    @property
    def counters(self) -> dict[str, Any]:
        """The counts that `restore` needs in addition to the state and to the numbers of steps."""
        return {
            "replay_starts_at": self.rate_limiter.replay_starts_at,
            "version": self.version,
            "incarnations": list(self.incarnations),
        }

    @property
    @abc.abstractmethod
    def version(self) -> int:
        """Version of the newest parameters that actors can fetch; it never decreases."""

    @property
    def num_ready_actors(self) -> int:
        """Number of actors that are ready."""
        return sum(actor.process.is_ready for actor in self._actors)

    # --- What its own thread does ---

    def _note_busy(self, group: str, seconds: float) -> None:
        self._stats.busy_seconds[group] += seconds

    def _begin(self, i: int, incarnation: int) -> None:
        """Makes an actor begin, as the given incarnation of its place."""
        self.incarnations[i], self._actors[i].num_asked = incarnation, 0
        self._supervisor.submit(self._actors[i].process, Actor.begin, incarnation)

    def _actor_is_lost(self, i: int) -> None:
        self._begin(i, self.incarnations[i] + 1)

    def _shard_is_lost(self, i: int) -> None:
        assert self._replay is not None
        newest = self._of_newest_checkpoint(self._read_replay) if self._config.checkpoint_replay else None
        self._replay.refill(i, newest)
        self._warm_up_if_empty()

    def _warm_up_if_empty(self) -> None:
        """Begins a new warm-up if there is nothing to learn from: after a loss of transitions or of learner steps.

        Without one, the first few transitions would be learned from over and over. And if learner steps are due, the
        actors would wait for the learner, and the learner for the actors.
        """
        if not self._can_learn():
            self.rate_limiter.begin_anew(self.env_steps, self.learner_steps)

    def _can_learn(self) -> bool:
        """Returns whether there are transitions to learn from."""
        return self._replay is not None and self._replay.num_transitions > 0

    def _in_turn(self) -> list[int]:
        return sorted(range(len(self._actors)), key=lambda i: self._actors[i].asked_last)

    def _note_request(self, actor: A) -> None:
        self._num_requests += 1
        actor.asked_last = self._num_requests

    @property
    def _env_steps_per_chunk(self) -> int:
        return self._pool.rows_per_chunk * self._pool.lanes_per_actor

    def _issue_chunks(self) -> None:
        steps, num_flying = self._env_steps_per_chunk, sum(actor.num_chunks for actor in self._actors)
        for _ in range(CHUNKS_AHEAD):
            for i in self._in_turn():
                coming, actor = self.env_steps + num_flying * steps, self._actors[i]
                if coming >= self._config.env_steps or self.rate_limiter.is_far_ahead(coming, self.learner_steps):
                    return
                if actor.num_chunks < CHUNKS_AHEAD and actor.process.is_ready:
                    writer = Writer(self.incarnations[i], actor.num_asked)
                    actor.num_asked += 1
                    actor.num_chunks += 1
                    num_flying += 1
                    self._note_request(actor)
                    self._ask_for_chunk(i, writer)

    def _count(self, i: int, chunk_stats: ChunkStats) -> None:
        """Counts a chunk of actor `i` that the replay has stored."""
        stats, steps = self._stats, self._env_steps_per_chunk
        self.env_steps += steps
        stats.env_steps += steps
        stats.actor_env_steps[i] += steps
        stats.returns += chunk_stats.returns
        stats.lengths += chunk_stats.lengths
        stats.q_mean.append(chunk_stats.q_mean)
        stats.num_failures += chunk_stats.num_failures
        stats.received_bytes += chunk_stats.received_bytes
