"""A gossip peer as a process on Ray."""

from collections.abc import Callable, Mapping

from qfleet.config import TrainConfig
from qfleet.core.replay import SavedReplay
from qfleet.topologies.base import OwnLearner
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess
from qfleet.topologies.gossip.averaging import Leaves
from qfleet.topologies.gossip.peer import GossipPeer, PeerChunkStats, StartingPoint


class RemotePeer(InRemoteProcess):
    """A `GossipPeer` in a process of its own. A method calls the peer's method of the same name."""

    def __init__(
        self, variables: Mapping[str, str], config: TrainConfig, make_run: Callable[[TrainConfig], OwnLearner]
    ) -> None:
        """Makes a peer; `variables` are those of `InRemoteProcess`."""
        super().__init__(variables)
        self._peer = GossipPeer(config, make_run)

    def prepare(self) -> None:
        """Compiles and starts the run."""
        self._peer.prepare()

    def begin(self, start: StartingPoint, learner: Reference[Leaves], replay: Reference[SavedReplay | None]) -> None:
        """Begins training, or continues from where another process stopped."""
        self._peer.begin(start, learner.copy(), replay.copy())

    def take_chunk(self, num_env_steps: int) -> tuple[PeerChunkStats, Reference[Leaves]]:
        """Takes a chunk without an averaging step."""
        stats, snapshot = self._peer.take_chunk(num_env_steps)
        return stats, Reference(snapshot)

    def average_and_take_chunk(
        self, num_env_steps: int, learner_steps_then: int, own: Reference[Leaves], other: Reference[Leaves]
    ) -> tuple[PeerChunkStats, Reference[Leaves]]:
        """Takes a chunk after an averaging step."""
        stats, snapshot = self._peer.take_chunk(num_env_steps, learner_steps_then, own.value, other.value)
        return stats, Reference(snapshot)

    def copy_learner(self) -> Reference[Leaves]:
        """Returns the leaves of the `LearnerState`, for another peer to begin with."""
        return Reference(self._peer.copy_learner()[1])

    def learner(self) -> Reference[tuple[int, Leaves]]:
        """Returns the learner steps as well, for the run's process."""
        return Reference(self._peer.copy_learner())

    def state(self) -> Reference[tuple[int, Leaves, SavedReplay | None] | None]:
        """Returns what a checkpoint holds of the peer."""
        return Reference(self._peer.state())
