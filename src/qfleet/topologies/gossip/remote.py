"""A gossip peer as a process on Ray."""

from qfleet.core.replay import SavedReplay
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess
from qfleet.topologies.gossip.averaging import Leaves
from qfleet.topologies.gossip.peer import GossipPeer, PeerChunkStats, StartingPoint


class RemotePeer(InRemoteProcess, GossipPeer):
    """A peer in a process of its own. Its methods do what those of `GossipPeer` do, with references to arrays."""

    def begin_from(
        self, start: StartingPoint, learner: Reference[Leaves], replay: Reference[SavedReplay | None]
    ) -> None:
        """Does what `begin` does."""
        self.begin(start, learner.copy(), replay.copy())

    def take_chunk(self, num_env_steps: int) -> tuple[PeerChunkStats, Reference[Leaves]]:
        """Does what `advance` does without an averaging step."""
        stats, snapshot = self.advance(num_env_steps)
        return stats, Reference(snapshot)

    def average_and_take_chunk(
        self, num_env_steps: int, learner_steps_then: int, own: Reference[Leaves], other: Reference[Leaves]
    ) -> tuple[PeerChunkStats, Reference[Leaves]]:
        """Does what `advance` does after an averaging step."""
        stats, snapshot = self.advance(num_env_steps, learner_steps_then, own.value, other.value)
        return stats, Reference(snapshot)

    def newest_learner(self) -> Reference[tuple[int, Leaves]]:
        """Does what `learner` does."""
        return Reference(self.learner())

    def leaves_of_learner(self) -> Reference[Leaves]:
        """Returns the leaves of the `LearnerState`, for another peer to begin with."""
        return Reference(self.learner()[1])

    def newest_state(self) -> Reference[tuple[int, Leaves, SavedReplay | None] | None]:
        """Does what `state` does."""
        return Reference(self.state())
