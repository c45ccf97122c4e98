"""Base class of directors that drive a pool of actors: it asks them for chunks in turn, as many as are due."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from qfleet.config import RayTopologyConfig, TrainConfig
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fleet.actor import Report
from qfleet.topologies.fleet.director import Director, Tally
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD, RateLimiter
from qfleet.topologies.fleet.replay_shard import Writer
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.supervisor import RemoteProcess


class PoolStats(Tally):
    """What happened since the last record where actors act."""

    def __init__(self, num_actors: int, who: tuple[str, ...]) -> None:
        """Begins with nothing; `who` is at work, as it is shown."""
        super().__init__()
        self.env_steps = self.learner_steps = self.num_failures = 0
        self.actor_env_steps = np.zeros(num_actors, np.int64)
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.q_mean: list[float] = []
        self.staleness: list[int] = []
        self.received_bytes = 0
        """Parameters, by all actors."""
        self.busy_seconds = dict.fromkeys(who, 0.0)


@dataclasses.dataclass
class PooledActor:
    """What a director knows of an actor."""

    process: RemoteProcess
    num_chunks: int = 0
    """That it was asked for, and that are not in the replay yet."""
    num_asked: int = 0
    """Chunks, of the incarnation that has the place."""
    asked_last: int = 0
    """When, counted in requests to all of them."""


T = TypeVar("T", bound=PoolStats)
M = TypeVar("M", bound=PooledActor)


class ActorsDirector(Director[T], Generic[T, M]):
    """Directs actors, and whoever keeps and learns from what they do."""

    _replay: ShardedReplay | None
    """That they share, if they do."""

    def __init__(
        self, config: TrainConfig, num_batches: int, read_replay: Callable[[Checkpoints, int], SavedReplay]
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          num_batches: that are learned from at once.
          read_replay: reads the replay of a checkpoint, as one for all.
        """
        topology = config.topology_as(RayTopologyConfig)
        self._config, self._pool, self._read_replay = config, topology.actor_pool, read_replay
        super().__init__(topology.ray_address, topology.silence_seconds, topology.max_restarts)
        self.rate_limiter = RateLimiter(config, num_batches)
        self.incarnations = [0] * self._pool.num_actors
        """Of each actor, how many had its place before."""
        self._actors: list[M] = []
        self._num_requests = 0

    @abc.abstractmethod
    def _ask_for_chunk(self, i: int, writer: Writer) -> None:
        """Asks actor `i`, which has a place, for a chunk by that writer."""

    @abc.abstractmethod
    def _restore_processes(self, state: dict[str, Any], incarnation: int, version: int) -> None:
        """Has all parts go on from a checkpoint.

        Args:
          state: of the checkpoint.
          incarnation: of the actors, that none has had before.
          version: of parameters, beyond which nobody has seen any.
        """

    # --- For other threads ---

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Has all parts go on from a checkpoint, before the first `resume`; without a replay, from an empty one."""
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps
        self.rate_limiter.resume(starts_at, self.env_steps, self.learner_steps)
        # There may have been more of them, or fewer, or none.
        incarnation = max(counters.get("incarnations", []), default=-1) + 1
        self._post(lambda: self._restore_processes(state, incarnation, counters.get("version", 0)))

    @property
    def num_ready_actors(self) -> int:
        """Actors that have a place."""
        return sum(actor.process.is_ready for actor in self._actors)

    # --- What its own thread does ---

    def _note_busy(self, who: str, seconds: float) -> None:
        self._tally.busy_seconds[who] += seconds

    def _begin(self, i: int, incarnation: int) -> None:
        """Has an actor begin, as the one of so many before it that its place has had."""
        self.incarnations[i], self._actors[i].num_asked = incarnation, 0
        self._supervisor.submit(self._actors[i].process, "begin", incarnation)

    def _actor_is_lost(self, i: int) -> None:
        self._begin(i, self.incarnations[i] + 1)

    def _shard_is_lost(self, i: int) -> None:
        assert self._replay is not None
        newest = self._of_newest_checkpoint(self._read_replay) if self._config.checkpoint_replay else None
        if not self._replay.was_lost(i, newest):  # then few are learned from over and over, but for a new warm-up
            self.rate_limiter.begin_anew(self.env_steps, self.learner_steps)

    def _in_turn(self) -> list[int]:
        return sorted(range(len(self._actors)), key=lambda i: self._actors[i].asked_last)

    def _note_request(self, actor: M) -> None:
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

    def _count(self, i: int, report: Report) -> None:
        """Counts a chunk that the replay has."""
        tally, steps = self._tally, self._env_steps_per_chunk
        self.env_steps += steps
        tally.env_steps += steps
        tally.actor_env_steps[i] += steps
        tally.returns += report.returns
        tally.lengths += report.lengths
        tally.q_mean.append(report.q_mean)
        tally.num_failures += report.num_failures
        tally.received_bytes += report.received_bytes
