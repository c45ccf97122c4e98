"""A replay in shards, as a state machine knows it: it stores chunks, draws batches, and returns their priorities."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qfleet.config import ActorPool
from qfleet.core.keys import Stream
from qfleet.core.replay import DrawShare, SavedReplay
from qfleet.core.types import Transition
from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.messages import CallRequest, Dropped, ProcessId, Replied, SavedShare
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import EMPTY_SHARD, InsertReply, SampleReply, ShardStats, Writer
from qfleet.topologies.fleet.replay_shares import deal


class ArrivedChunk(NamedTuple):
    """A chunk that an actor has returned, to be stored by a shard."""

    actor: int
    writer: Writer
    """Incarnation of the actor, and the number of chunks that this incarnation had sent before."""
    chunk: Reference[Chunk]
    stats: ChunkStats
    staleness: int = 0
    """Learner steps between the parameters that acted and the newest, when the chunk arrived."""


@dataclasses.dataclass(frozen=True, eq=False)
class Insert(CallRequest[InsertReply]):
    """Store a chunk. If the shard is lost meanwhile, its replacement stores the chunk."""

    segment: int
    """The actor's position among the actors of the shard."""
    arrived: ArrivedChunk


@dataclasses.dataclass(frozen=True, eq=False)
class SampleShare(CallRequest[SampleReply[Reference[Transition]]]):
    """Draw a share of a batch, with the arguments of `ReplayShard.sample_share`."""

    number: int
    seed: int
    importance_exponent: float
    share: DrawShare
    most: int


@dataclasses.dataclass(frozen=True, eq=False)
class SetPriorities(CallRequest[ShardStats]):
    """Set the priorities of a share that the shard has drawn."""

    number: int
    priority: Reference[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class RestoreReplay(CallRequest[ShardStats]):
    """Go on from a share of a saved replay."""

    saved: Reference[SavedReplay]


class Drawn(NamedTuple):
    """One or several batches, drawn over all shards."""

    number: int
    """Identifies the draw at the shards."""
    places: list[np.ndarray]
    """For each share, the positions of its transitions in the whole, `[num_draws]`."""
    samples: list[SampleShare]
    """For each share, the request to the shard that draws it."""

    @property
    def transitions(self) -> list[Reference[Transition]]:
        """For each share, its transitions, `[num_draws, ...]`."""
        return [sample.results[0] for sample in self.samples]


class ShardedReplay:
    """Decides which shard stores what and how much each draws, and counts what is on its way to the shards."""

    def __init__(self, seed: int, pool: ActorPool, note_busy: Callable[[float], None]) -> None:
        """Begins with empty shards.

        Args:
          seed: of the run.
          pool: the actors, and how many shards keep what they do.
          note_busy: called with the seconds that a shard has worked.
        """
        self._seed, self._note_busy = seed, note_busy
        self.shards = [ProcessId("replay shard", i) for i in range(pool.num_shards)]
        self._stats = [EMPTY_SHARD] * pool.num_shards
        self._random = np.random.default_rng((seed, Stream.REPLAY_SHARES))
        self._num_drawn = self._num_inserting = self._num_returning = 0

    @property
    def num_transitions(self) -> int:
        """Number of transitions, with those that a shard is about to get from a checkpoint."""
        return sum(stats.num_transitions for stats in self._stats)

    @property
    def is_busy(self) -> bool:
        """Whether chunks or priorities are on their way to a shard."""
        return bool(self._num_inserting or self._num_returning)

    def store(self, arrived: ArrivedChunk) -> Insert:
        """Has a shard store an actor's chunk."""
        self._num_inserting += 1
        segment, shard = divmod(arrived.actor, len(self.shards))
        return Insert(self.shards[shard], segment, arrived)

    def draw(self, size: int, importance_exponent: float) -> Drawn | None:
        """Draws `size` transitions over all shards as if from one replay; None if there are none."""
        num_transitions = self.num_transitions
        priorities = np.array([stats.total_priority for stats in self._stats])
        if not priorities.any():
            return None
        number, self._num_drawn = self._num_drawn, self._num_drawn + 1
        counts, shares = deal(size, priorities, self._random)
        order = self._random.permutation(size).astype(np.uint32)
        drawn = Drawn(number, [place for place in np.split(order, np.cumsum(counts)[:-1]) if len(place)], [])
        for shard, count, share in zip(self.shards, counts, shares, strict=True):
            if count:
                draws = DrawShare(np.int32(count), np.float32(share), np.float32(num_transitions))  # type: ignore[arg-type]
                seed = int(self._random.integers(2**32))
                sample = SampleShare(shard, number, seed, importance_exponent, draws, size, results=[Reference()])
                drawn.samples.append(sample)
        return drawn

    def return_priorities(self, drawn: Drawn, priorities: Sequence[Reference[np.ndarray]]) -> list[SetPriorities]:
        """Has each shard set the priorities of the share that it has drawn."""
        self._num_returning += len(drawn.samples)
        return [
            SetPriorities(sample.process, drawn.number, priority)
            for sample, priority in zip(drawn.samples, priorities, strict=True)
        ]

    def hear(self, event: Replied | Dropped) -> None:
        """Notes what became of a request to a shard. Chunks and priorities are dropped with the node that kept them."""
        request = event.request
        self._num_inserting -= isinstance(request, Insert)
        self._num_returning -= isinstance(request, SetPriorities)
        if isinstance(event, Replied):
            has_more = isinstance(request, Insert | SampleShare)
            stats: ShardStats = event.reply.stats if has_more else event.reply
            self._stats[request.process.number] = stats
            self._note_busy(stats.busy_seconds)

    def lose(self, shard: int) -> int:
        """Notes that a shard has lost all its transitions, and returns their number."""
        num_lost, self._stats[shard] = self._stats[shard].num_transitions, EMPTY_SHARD
        return num_lost

    def refill(self, shard: int, share: SavedShare) -> RestoreReplay:
        """Has a shard go on from its share of a checkpoint. Nothing can be drawn from it until it has replied."""
        self._stats[shard] = EMPTY_SHARD._replace(num_transitions=share.num_transitions)
        return RestoreReplay(self.shards[shard], share.replay)

    def restore(self, shares: Sequence[SavedShare], env_steps: int) -> list[RestoreReplay]:
        """Has all shards go on from their shares of a checkpoint; nothing if it has no replay.

        Later draws come from a stream that depends on where the run goes on, so that it repeats none.
        """
        self._random = np.random.default_rng((self._seed, Stream.REPLAY_SHARES, env_steps))
        return [self.refill(i, share) for i, share in enumerate(shares)]
