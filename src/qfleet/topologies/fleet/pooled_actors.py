"""The actors of a fleet, as its state machine knows them: whose turn it is, and how many chunks are under way."""

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

from qfleet.config import ActorPool, TrainConfig
from qfleet.topologies.fleet.messages import Begin, ProcessId
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD, RateLimiter
from qfleet.topologies.fleet.replay_shard import Writer


@dataclasses.dataclass
class PooledActor:
    """What the machine knows about an actor."""

    process: ProcessId
    is_ready: bool = False
    incarnation: int = 0
    """Number of actors that held its place before."""
    num_chunks_under_way: int = 0
    """Chunks that the actor was asked for and that are not in the replay yet."""
    num_asked: int = 0
    """Chunks that the current incarnation of the actor was asked for."""
    asked_last: int = 0
    """Time of the last request to the actor, counted in requests to all actors."""


A = TypeVar("A", bound=PooledActor)


class PooledActors(Generic[A]):
    """Decides which actors are asked for chunks: they take turns, as far as the rate limiter lets them."""

    def __init__(self, config: TrainConfig, pool: ActorPool, num_batches: int, actors: Sequence[A]) -> None:
        """Begins with actors that aren't ready.

        Args:
          config: of the run.
          pool: number and size of the actors.
          num_batches: learner steps of one round.
          actors: the actors.
        """
        self.each = actors
        self.env_steps = 0
        """Environment steps taken so far: those of chunks that the replay has stored."""
        self.env_steps_per_chunk = pool.rows_per_chunk * pool.lanes_per_actor
        self.rate_limiter = RateLimiter(config, pool, num_batches)
        self._end_env_steps, self._num_requests = config.env_steps, 0

    def begin(self, i: int, incarnation: int) -> Begin:
        """Has an actor begin, as the given incarnation of its place."""
        actor = self.each[i]
        actor.incarnation, actor.num_asked = incarnation, 0
        return Begin(actor.process, incarnation)

    def begin_all(self, incarnation: int) -> list[Begin]:
        """Has all actors begin."""
        return [self.begin(i, incarnation) for i in range(len(self.each))]

    def replace(self, i: int) -> Begin:
        """Has the replacement of a lost actor begin, once it is ready."""
        self.each[i].is_ready = False
        return self.begin(i, self.each[i].incarnation + 1)

    def in_turn(self) -> list[int]:
        """Returns the numbers of all actors; those that have waited longest for a request come first."""
        return sorted(range(len(self.each)), key=lambda i: self.each[i].asked_last)

    def note_request(self, i: int) -> None:
        """Notes that an actor has had its turn."""
        self._num_requests += 1
        self.each[i].asked_last = self._num_requests

    def next_chunks(self, learner_steps: int) -> list[tuple[int, Writer]]:
        """Returns the chunks to ask for now, each by its actor and its writer, and counts them as asked for.

        Args:
          learner_steps: taken so far.
        """
        chunks: list[tuple[int, Writer]] = []
        num_flying = sum(actor.num_chunks_under_way for actor in self.each)
        for _ in range(CHUNKS_AHEAD):
            for i in self.in_turn():
                actor = self.each[i]
                if actor.num_chunks_under_way >= CHUNKS_AHEAD or not actor.is_ready:
                    continue
                coming = self.env_steps + num_flying * self.env_steps_per_chunk
                if coming >= self._end_env_steps or self.rate_limiter.is_far_ahead(coming, learner_steps):
                    return chunks
                chunks.append((i, Writer(actor.incarnation, actor.num_asked)))
                actor.num_asked += 1
                actor.num_chunks_under_way += 1
                num_flying += 1
                self.note_request(i)
        return chunks
