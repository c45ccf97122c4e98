"""A shard of a replay as a process of its own."""

from collections.abc import Mapping

import numpy as np

from qfleet.config import TrainConfig
from qfleet.core.replay import DrawShare, SavedReplay
from qfleet.core.types import Transition
from qfleet.topologies.fleet.actor import Chunk
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess
from qfleet.topologies.fleet.replay_shard import InsertReply, ReplayShard, SampleReply, ShardStats, Writer


class RemoteReplayShard(InRemoteProcess):
    """A `ReplayShard` in a process of its own. A method calls the shard's method of the same name."""

    def __init__(self, variables: Mapping[str, str], config: TrainConfig, number: int) -> None:
        """Makes an empty shard; `variables` are those of `InRemoteProcess`."""
        super().__init__(variables)
        self._shard = ReplayShard(config, number)

    def insert(self, segment: int, writer: Writer, chunk: Reference[Chunk]) -> InsertReply:
        """Stores a chunk."""
        return self._shard.insert(segment, writer, chunk.value)

    def sample_share(
        self, number: int, seed: int, importance_exponent: float, share: DrawShare, most: int
    ) -> SampleReply[Reference[Transition]]:
        """Draws this shard's share of a batch."""
        reply = self._shard.sample_share(number, seed, importance_exponent, share, most)
        return SampleReply(reply.stats, Reference(reply.transitions))

    def set_priorities(self, number: int, priority: Reference[np.ndarray]) -> ShardStats:
        """Sets the priorities of a draw's transitions."""
        return self._shard.set_priorities(number, priority.value)

    def snapshot(self) -> Reference[SavedReplay]:
        """Returns a copy of what the shard holds."""
        return Reference(self._shard.snapshot())

    def restore(self, saved: Reference[SavedReplay]) -> ShardStats:
        """Goes on from a snapshot."""
        return self._shard.restore(saved.copy())
