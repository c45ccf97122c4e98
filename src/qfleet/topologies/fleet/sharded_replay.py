"""A replay in shards, as the director of a run knows it: what is stored, who draws what, and whose errors return."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import RayTopologyConfig, TrainConfig
from qfleet.core.replay import DrawShare, SavedReplay
from qfleet.topologies.fleet.replay_shard import EMPTY_SHARD, ShardStats, Writer, deal, share_of
from qfleet.topologies.fleet.supervisor import RemoteProcess, Supervisor

logger = logging.getLogger("qfleet")


class Drawn(NamedTuple):
    """A batch, or several, on its way from the shards."""

    number: int
    places: list[np.ndarray]
    """For each part, where its transitions go, `[num_draws]`."""
    references: list[Any]
    """To the parts: transitions, `[num_draws, ...]`."""
    shards: list["_Shard"]
    """Of whom they are."""


@dataclasses.dataclass
class _Shard:
    process: RemoteProcess
    stock: ShardStats = EMPTY_SHARD


class ShardedReplay:
    """The shards of a replay. For the director's thread."""

    def __init__(self, config: TrainConfig, supervisor: Supervisor, note_busy: Callable[[float], None]) -> None:
        """Has no shards yet.

        Args:
          config: of the run.
          supervisor: by whom the shards are asked.
          note_busy: told the seconds that a shard was at work.
        """
        self._pool = config.topology_as(RayTopologyConfig).actor_pool
        self._supervisor, self._note_busy = supervisor, note_busy
        self._shards: list[_Shard] = []
        self._random = np.random.default_rng((config.seed, 3))
        self._num_drawn = self._num_inserting = self._num_returning = 0

    def add(self, process: RemoteProcess) -> None:
        """Takes the next shard."""
        self._shards.append(_Shard(process))

    @property
    def processes(self) -> list[RemoteProcess]:
        """Its shards."""
        return [shard.process for shard in self._shards]

    @property
    def num_transitions(self) -> int:
        """That it holds."""
        return sum(shard.stock.num_transitions for shard in self._shards)

    @property
    def is_busy(self) -> bool:
        """Whether chunks or errors are on their way to it."""
        return bool(self._num_inserting or self._num_returning)

    def store(
        self, actor: int, writer: Writer, reference: Any, stored: Callable[[], None], gone: Callable[[], None]
    ) -> None:
        """Has its shard store an actor's chunk: also the one that replaces it, if this one is lost at it.

        Args:
          actor: its number.
          writer: its incarnation, and how many chunks that one had sent before.
          reference: to the chunk.
          stored: called if it is, before `gone`.
          gone: called in any case: also if the chunk is lost with the node that kept it.
        """
        shard = self._shards[actor % len(self._shards)]
        self._num_inserting += 1

        def ended() -> None:
            self._num_inserting -= 1
            gone()

        def answered(answer: tuple[ShardStats, bool]) -> None:
            self._note_stock(shard, answer[0])
            if answer[1]:
                stored()
            ended()

        self._supervisor.submit(
            shard.process, "insert", actor // len(self._shards), writer, reference, on_reply=answered,
            needs=(reference,), on_dropped=ended, is_repeated=True,
        )  # fmt: skip

    def draw(self, size: int, importance_exponent: float) -> Drawn | None:
        """Asks for so many transitions, drawn over all shards as from one replay; None if it holds none."""
        num_transitions = self.num_transitions
        if not num_transitions:
            return None
        number, self._num_drawn = self._num_drawn, self._num_drawn + 1
        priorities = np.array([shard.stock.priority for shard in self._shards])
        counts, shares = deal(size, priorities, self._random)
        order = self._random.permutation(size).astype(np.uint32)
        drawn = Drawn(number, [place for place in np.split(order, np.cumsum(counts)[:-1]) if len(place)], [], [])
        for shard, count, share in zip(self._shards, counts, shares, strict=True):
            if count:
                draws = DrawShare(np.int32(count), np.float32(share), np.float32(num_transitions))  # type: ignore[arg-type]
                seed = int(self._random.integers(2**32))
                asked = self._supervisor.submit(
                    shard.process, "sample", number, seed, importance_exponent, draws, size, num_returns=2,
                    on_reply=lambda stock, _, shard=shard: self._note_stock(shard, stock),
                )  # fmt: skip
                drawn.references.append(asked[1])
                drawn.shards.append(shard)
        return drawn

    def return_errors(self, drawn: Drawn, references: tuple[Any, ...]) -> None:
        """Passes the TD errors of each part on to the shard that it came from."""
        for shard, reference in zip(drawn.shards, references, strict=True):
            self._num_returning += 1

            def gone() -> None:  # set, or lost with the shard or the node that kept them
                self._num_returning -= 1

            def returned(stock: ShardStats, shard: _Shard = shard, gone: Callable[[], None] = gone) -> None:
                gone()
                self._note_stock(shard, stock)

            self._supervisor.submit(
                shard.process,
                "set_priorities",
                drawn.number,
                reference,
                on_reply=returned,
                needs=(reference,),
                on_dropped=gone,
            )

    def give(self, i: int, saved: SavedReplay) -> int:
        """Has a shard go on from its lanes of a saved replay, and returns how many transitions they hold."""
        shard = self._shards[i]
        own = share_of(saved, self._pool, i)
        self._supervisor.submit(shard.process, "restore", own, on_reply=functools.partial(self._note_stock, shard))
        return int(np.sum(np.asarray(own.leaves) > 0))

    def was_lost(self, i: int, newest: tuple[SavedReplay, dict[str, Any]] | None) -> bool:
        """Has a shard that was replaced go on from the newest checkpoint's replay and counters, or from nothing.

        Returns:
          Whether there are any transitions yet, in this shard or another.
        """
        shard, lost = self._shards[i], self._shards[i].stock.num_transitions
        shard.stock = EMPTY_SHARD
        found, whence = 0, "there is no checkpoint that has them"
        if newest:
            saved, counters = newest
            found = self.give(i, saved)
            whence = f"from the checkpoint at environment step {counters['env_steps']}"
        logger.warning("%s held %d transitions; %d are back: %s", shard.process.name, lost, found, whence)
        return bool(found or self.num_transitions)

    def _note_stock(self, shard: _Shard, stock: ShardStats) -> None:
        shard.stock = stock
        self._note_busy(stock.busy_seconds)
