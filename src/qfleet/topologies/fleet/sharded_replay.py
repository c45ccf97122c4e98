"""The director's view of a replay in shards: stores chunks, draws batches, and returns TD errors to their shards."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import ActorPool
from qfleet.core.keys import Stream
from qfleet.core.replay import DrawShare, SavedReplay
from qfleet.core.types import Transition
from qfleet.topologies.fleet.actor import Chunk
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.replay_shard import EMPTY_SHARD, ShardStats, Writer
from qfleet.topologies.fleet.replay_shares import deal, share_of
from qfleet.topologies.fleet.supervisor import RemoteProcess, Supervisor

logger = logging.getLogger("qfleet")


class Drawn(NamedTuple):
    """One or several batches, on their way from the shards."""

    number: int
    """Identifies the draw at the shards."""
    places: list[np.ndarray]
    """For each share, the positions of its transitions in the whole, `[num_draws]`."""
    references: list[Reference[Transition]]
    """For each share, its transitions, `[num_draws, ...]`."""
    shards: list["_Shard"]
    """For each share, the shard that draws it."""


@dataclasses.dataclass
class _Shard:
    process: RemoteProcess[RemoteReplayShard]
    stats: ShardStats = EMPTY_SHARD


class ShardedReplay:
    """The shards of a replay. Only the director's thread uses it."""

    def __init__(self, seed: int, pool: ActorPool, supervisor: Supervisor, note_busy: Callable[[float], None]) -> None:
        """Has no shards yet.

        Args:
          seed: of the run.
          pool: the actors, and how many shards keep what they do.
          supervisor: passes requests on to the shards.
          note_busy: called with the seconds that a shard has worked.
        """
        self._seed, self._pool, self._supervisor, self._note_busy = seed, pool, supervisor, note_busy
        self._shards: list[_Shard] = []
        self._random = np.random.default_rng((seed, Stream.REPLAY_SHARES))
        self._num_drawn = self._num_inserting = self._num_returning = 0

    def add(self, process: RemoteProcess[RemoteReplayShard]) -> None:
        """Adds the process of the next shard."""
        self._shards.append(_Shard(process))

    def resume_at(self, env_steps: int) -> None:
        """Draws anew from a stream that depends on where a resumed run goes on, so that it repeats no draws."""
        self._random = np.random.default_rng((self._seed, Stream.REPLAY_SHARES, env_steps))

    @property
    def processes(self) -> list[RemoteProcess[RemoteReplayShard]]:
        """Processes of its shards."""
        return [shard.process for shard in self._shards]

    @property
    def num_transitions(self) -> int:
        """Number of transitions, with those that a shard is about to get from a checkpoint."""
        return sum(shard.stats.num_transitions for shard in self._shards)

    @property
    def is_busy(self) -> bool:
        """Whether chunks or TD errors are on their way to a shard."""
        return bool(self._num_inserting or self._num_returning)

    def store(
        self,
        actor: int,
        writer: Writer,
        chunk: Reference[Chunk],
        on_stored: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        """Has a shard store an actor's chunk. If the shard is lost meanwhile, its replacement stores the chunk.

        Args:
          actor: number of the actor.
          writer: incarnation of the actor, and the number of chunks that this incarnation had sent before.
          chunk: what the actor has done.
          on_stored: called if the chunk is stored, before `on_gone`.
          on_gone: called in any case, even if the chunk is lost with the node that kept it.
        """
        shard = self._shards[actor % len(self._shards)]
        self._num_inserting += 1

        def gone() -> None:
            self._num_inserting -= 1
            on_gone()

        def replied(reply: tuple[ShardStats, bool]) -> None:
            stats, is_stored = reply
            self._note_stats(shard, stats)
            if is_stored:
                on_stored()
            gone()

        self._supervisor.submit(
            shard.process, RemoteReplayShard.insert_chunk, actor // len(self._shards), writer, chunk, on_reply=replied,
            on_dropped=gone, is_repeated=True,
        )  # fmt: skip

    def draw(self, size: int, importance_exponent: float) -> Drawn | None:
        """Requests `size` transitions, drawn over all shards as if from one replay; None if there are none."""
        num_transitions, priorities = self.num_transitions, np.array([shard.stats.priority for shard in self._shards])
        if not priorities.any():
            return None
        number, self._num_drawn = self._num_drawn, self._num_drawn + 1
        counts, shares = deal(size, priorities, self._random)
        order = self._random.permutation(size).astype(np.uint32)
        drawn = Drawn(number, [place for place in np.split(order, np.cumsum(counts)[:-1]) if len(place)], [], [])
        for shard, count, share in zip(self._shards, counts, shares, strict=True):
            if count:
                draws = DrawShare(np.int32(count), np.float32(share), np.float32(num_transitions))  # type: ignore[arg-type]
                seed = int(self._random.integers(2**32))
                drawn.references.extend(
                    self._supervisor.submit(
                        shard.process, RemoteReplayShard.sample_share, number, seed, importance_exponent, draws, size,
                        on_reply=functools.partial(self._was_drawn, shard), num_references=1,
                    )
                )  # fmt: skip
                drawn.shards.append(shard)
        return drawn

    def _was_drawn(self, shard: _Shard, reply: tuple[ShardStats, Any]) -> None:
        self._note_stats(shard, reply[0])

    def return_priorities(self, drawn: Drawn, priorities: Sequence[Reference[np.ndarray]]) -> None:
        """Sends the TD errors of each share to the shard that has drawn it."""
        for shard, priority in zip(drawn.shards, priorities, strict=True):
            self._num_returning += 1

            def gone() -> None:  # the errors are set, or they are lost with the shard or with the node that kept them
                self._num_returning -= 1

            def replied(stats: ShardStats, shard: _Shard = shard, gone: Callable[[], None] = gone) -> None:
                gone()
                self._note_stats(shard, stats)

            self._supervisor.submit(
                shard.process, RemoteReplayShard.take_priorities, drawn.number, priority, on_reply=replied,
                on_dropped=gone,
            )  # fmt: skip

    def give(self, i: int, saved: SavedReplay) -> int:
        """Has a shard go on from its share of a saved replay, and returns how many transitions the share holds."""
        shard, own = self._shards[i], share_of(saved, self._pool, i)
        num_found = int(np.sum(np.asarray(own.leaves) > 0))
        shard.stats = EMPTY_SHARD._replace(num_transitions=num_found)  # nothing can be drawn until it has replied
        self._supervisor.submit(
            shard.process, RemoteReplayShard.go_on_from, Reference(own),
            on_reply=functools.partial(self._note_stats, shard),
        )  # fmt: skip
        return num_found

    def refill(self, i: int, newest: tuple[SavedReplay, dict[str, Any]] | None) -> None:
        """Has the replacement of a lost shard go on from the newest checkpoint, or empty if there is none.

        Args:
          i: number of the shard.
          newest: replay and counters of the newest checkpoint.
        """
        shard, num_lost = self._shards[i], self._shards[i].stats.num_transitions
        shard.stats = EMPTY_SHARD
        num_found, origin = 0, "there is no checkpoint that has them"
        if newest:
            saved, counters = newest
            num_found = self.give(i, saved)
            origin = f"from the checkpoint at environment step {counters['env_steps']}"
        logger.warning("%s held %d transitions; %d are back: %s", shard.process.name, num_lost, num_found, origin)

    def _note_stats(self, shard: _Shard, stats: ShardStats) -> None:
        shard.stats = stats
        self._note_busy(stats.busy_seconds)
