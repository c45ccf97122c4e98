"""A shard of a replay as a process of its own."""

import numpy as np

from qfleet.core.replay import DrawShare, SavedReplay
from qfleet.core.types import Transition
from qfleet.topologies.fleet.actor import Chunk
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess
from qfleet.topologies.fleet.replay_shard import ReplayShard, ShardStats, Writer


class RemoteReplayShard(InRemoteProcess, ReplayShard):
    """A shard in a process of its own. Its methods do what those of `ReplayShard` do, with references to arrays."""

    def insert_chunk(self, segment: int, writer: Writer, chunk: Reference[Chunk]) -> tuple[ShardStats, bool]:
        """Does what `insert` does."""
        return self.insert(segment, writer, chunk.value)

    def sample_share(
        self, number: int, seed: int, importance_exponent: float, share: DrawShare, most: int
    ) -> tuple[ShardStats, Reference[Transition]]:
        """Does what `sample` does."""
        stats, transitions = self.sample(number, seed, importance_exponent, share, most)
        return stats, Reference(transitions)

    def take_priorities(self, number: int, priority: Reference[np.ndarray]) -> ShardStats:
        """Does what `set_priorities` does."""
        return self.set_priorities(number, priority.value)

    def saved(self) -> Reference[SavedReplay]:
        """Does what `snapshot` does."""
        return Reference(self.snapshot())

    def go_on_from(self, saved: Reference[SavedReplay]) -> ShardStats:
        """Does what `restore` does."""
        return self.restore(saved.copy())
