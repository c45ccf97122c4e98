"""The director of gossip: it carries out what `machine.GossipMachine` decides.

It starts the processes, makes a call of each request (`_call` has the method of each kind of request), and reads what
other threads ask for.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from qfleet.config import GossipConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replay import NO_STEP, SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.base import OwnLearner
from qfleet.topologies.fleet.calls import ValueIsLost
from qfleet.topologies.fleet.machine_director import MachineDirector
from qfleet.topologies.fleet.messages import CallRequest, ProcessId, Started
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import ON_CPU, ONE_CPU, RemoteProcess, default_resources
from qfleet.topologies.gossip.averaging import Leaves
from qfleet.topologies.gossip.machine import BeginFrom, CopyLearner, GossipMachine, GossipStats, Prepare, TakeChunk
from qfleet.topologies.gossip.peer import peer_config
from qfleet.topologies.gossip.peer_records import Exchange
from qfleet.topologies.gossip.remote import RemotePeer
from qfleet.topologies.mesh import leaves_of

logger = logging.getLogger("qfleet")


class GossipDirector(MachineDirector[GossipStats, GossipMachine]):
    """Coordinates the peers."""

    _needs_in_words = "all peers"
    _resource_flags = "--num-processes or --devices-per-process"

    def __init__(
        self,
        config: TrainConfig,
        make_run: Callable[[TrainConfig], OwnLearner],
        env_steps_per_chunk: int,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
        *,
        is_in_graph: bool,
    ) -> None:
        """Starts nothing yet.

        Args:
          config: config of the whole run.
          make_run: makes the run inside a peer. It must be a module's function, because other processes import it.
          env_steps_per_chunk: environment steps in one chunk of one peer.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads the replay of a checkpoint, as this run would have saved it.
          is_in_graph: whether the environment is written in JAX.
        """
        self._config, self._topology = config, config.topology_as(GossipConfig)
        self._make_run, self._is_in_graph = make_run, is_in_graph
        machine = GossipMachine(config, env_steps_per_chunk)
        super().__init__(self._topology, self._topology.actor_pool, machine, read_learner, read_replay)

    def _call(self, request: CallRequest[Any]) -> None:
        match request:
            case Prepare():
                self._submit(request, RemotePeer.prepare)
            case CopyLearner():
                self._submit(request, RemotePeer.copy_learner)
            case BeginFrom():
                self._submit(request, RemotePeer.begin, request.start, request.learner, request.replay)
            case TakeChunk(exchange=None):
                self._submit(request, RemotePeer.take_chunk, request.env_steps)
            case TakeChunk(exchange=Exchange(own, other)):
                method = RemotePeer.average_and_take_chunk
                self._submit(request, method, request.env_steps, own.learner_steps, own.params, other)
            case _:
                raise TypeError(f"no method belongs to {request}")

    # --- For other threads ---

    def begin_with(self, learner: LearnerState) -> None:
        """Sets what all peers begin with, before the first `resume`."""
        self.machine.learner = self._saved_learner(learner)

    @property
    def num_ready_peers(self) -> int:
        """Number of peers that train."""
        return sum(peer.stage == "training" for peer in self.machine.peers)

    def snapshots(self) -> list[Leaves]:
        """Returns the newest parameters of each peer that has trained, unless they are lost with their node."""
        with self._lock:
            snapshots = [peer.snapshot.params for peer in self.machine.peers if peer.snapshot is not None]
        found = []
        for snapshot in snapshots:
            try:
                found.append(self._supervisor.value(snapshot))
            except ValueIsLost as error:  # the peer's next chunk will show that its process is lost
                logger.debug("a snapshot is lost: %s", error)
        return found

    def states(self) -> Iterator[tuple[int, Leaves, SavedReplay | None] | None]:
        """Yields what `GossipPeer.state` returns, for each peer; None for a peer that is being replaced.

        They are fetched one by one, so that this process holds one of them at a time.

        Raises:
          StateIsLost: if a peer was lost meanwhile and there is no room for its replacement.
        """
        for peer in self.machine.peers:
            process = self._processes[peer.process]
            is_there = peer.stage != "absent"
            yield self._value_of(process, RemotePeer.state, gives_up=True) if is_there else None

    def learners(self) -> Iterator[tuple[int, Leaves] | None]:
        """Yields what `GossipPeer.copy_learner` returns, for each peer; None for a peer that doesn't train.

        Raises:
          StateIsLost: as `states` does.
        """
        for peer in self.machine.peers:
            process = self._processes[peer.process]
            trains = peer.stage == "training"
            yield self._value_of(process, RemotePeer.learner, gives_up=True) if trains else None

    def share_of_newest_checkpoint(self, number: int) -> SavedReplay | None:
        """Returns a peer's share of the replay in the newest checkpoint; None if there is no such replay."""
        share = self._find_replay(ProcessId("peer", number)).share
        return None if share is None else share.replay.value

    # --- Processes and checkpoints ---

    def _make_stats(self) -> GossipStats:
        return GossipStats(self._topology.num_processes)

    def _saved_learner(self, learner: LearnerState) -> Reference[Leaves]:
        return Reference(leaves_of(learner))

    def _num_transitions_in(self, share: SavedReplay) -> int:
        """Returns how many environment steps a share holds, without final observations."""
        held = np.asarray(share.ring.rows.outcome)[: int(share.ring.size[0])]  # a ring fills from its first row
        return int(np.sum(held != NO_STEP))

    def _resources(self) -> list[Mapping[str, float]]:
        return [ONE_CPU] * self._topology.num_processes

    def _missing(self) -> RemoteProcess | None:
        return next((self._processes[peer.process] for peer in self.machine.peers if peer.stage == "absent"), None)

    def _vital(self) -> list[RemoteProcess]:
        return []  # a checkpoint can do without any one peer: it holds the state of those that are ready

    def _start_processes(self) -> None:
        resources, environment = _needs_of_one_peer(self._topology)
        for i, peer in enumerate(self.machine.peers):
            arguments = (peer_config(self._config, i, is_in_graph=self._is_in_graph), self._make_run)
            labels = self._topology.process_node_labels
            self._start_process(peer.process, RemotePeer, arguments, resources, environment, labels)
        self._tell(Started())


def _needs_of_one_peer(topology: GossipConfig) -> tuple[Mapping[str, float], Mapping[str, str]]:
    """Returns a peer's resources on Ray, and its environment variables."""
    num_peers, num_devices = topology.num_processes, topology.devices_per_process
    resources = default_resources(num_peers * num_devices)
    if "GPU" in resources:
        return {**resources, "GPU": num_devices}, {}
    return resources, ON_CPU if num_peers > 1 else {"JAX_PLATFORMS": "cpu"}
