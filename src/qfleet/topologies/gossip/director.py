"""Directs the peers of gossip from a thread: requests chunks of them, tells pairs to exchange, replaces lost peers.

What to do is decided in `decisions`; this module turns decisions into requests, and replies into what is known about
the peers. The package's docstring shows the data flow.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import GossipConfig, TrainConfig
from qfleet.core.keys import Stream
from qfleet.core.replay import NO_STEP, SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.records import Progress
from qfleet.topologies.base import OwnLearner
from qfleet.topologies.fleet.calls import ValueIsLost
from qfleet.topologies.fleet.director import Director
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import ON_CPU, ONE_CPU, RemoteProcess, default_resources
from qfleet.topologies.fleet.replay_shares import share_of
from qfleet.topologies.fleet.stats import DirectorStats
from qfleet.topologies.gossip.averaging import Leaves, split_evenly
from qfleet.topologies.gossip.decisions import (
    PeerRecord,
    Snapshot,
    begin_exchange,
    choose_donor,
    chunks_to_request,
    draw_pairs,
)
from qfleet.topologies.gossip.peer import PeerChunkStats, StartingPoint, peer_config
from qfleet.topologies.gossip.remote import RemotePeer
from qfleet.topologies.mesh import leaves_of

logger = logging.getLogger("qfleet")


class GossipStats(DirectorStats):
    """What happened among the peers since the last record."""

    def __init__(self, num_peers: int) -> None:
        super().__init__()
        self.progress: list[Progress] = []
        """Progress of all chunks, in the order in which they arrived."""
        self.peer_env_steps = np.zeros(num_peers, np.int64)
        """`[num_peers]`, environment steps that each peer took."""
        self.num_exchanges = 0
        """Pairs that were told to exchange."""
        self.received_bytes = 0
        """Parameters that peers received from each other."""
        self.staleness: list[int] = []
        """Staleness of each averaging step, in learner steps."""


class InitialState(NamedTuple):
    """What peers begin with if there is no other peer to copy."""

    learner: Leaves
    replay: SavedReplay | None
    """Replay of all peers, with one segment for each; None for empty replays."""


class GossipDirector(Director[GossipStats]):
    """Directs the peers: requests one chunk after the other from each, and tells pairs of them to exchange."""

    _needs_in_words = "all peers"
    _resource_flags = "--num-processes or --devices-per-process"
    env_steps = 0
    learner_steps = 0

    def __init__(
        self,
        config: TrainConfig,
        make_run: Callable[[TrainConfig], OwnLearner],
        env_steps_per_chunk: int,
        read_learner: Callable[[Checkpoints, int], Leaves],
        read_replay: Callable[[Checkpoints, int], SavedReplay] | None,
        *,
        is_in_graph: bool,
    ) -> None:
        """Starts nothing yet.

        Args:
          config: config of the whole run.
          make_run: makes the run inside a peer. It must be a module's function, because other processes import it.
          env_steps_per_chunk: environment steps in one chunk of one peer.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads the replay of a checkpoint, as this run would have saved it; None if checkpoints have none.
          is_in_graph: whether the environment is written in JAX.
        """
        topology = config.topology_as(GossipConfig)
        self._config, self._topology, self._make_run = config, topology, make_run
        super().__init__(topology.ray_address, topology.silence_seconds, topology.max_restarts)
        self._env_steps_per_chunk, self._is_in_graph = env_steps_per_chunk, is_in_graph
        self._read_learner, self._read_replay = read_learner, read_replay
        self._random = np.random.default_rng((config.seed, Stream.EXCHANGES))
        self._peers: list[PeerRecord] = []
        self._processes: list[RemoteProcess] = []
        """The process of each peer, in the order of `_peers`."""
        self._num_chunk_requests = 0
        """Chunks requested so far, of all peers."""
        self._initial: InitialState | None = None
        has_replay = config.agent.replay != "none"
        self._replay_capacity = config.agent.replay_capacity // topology.num_processes if has_replay else 0
        """Capacity of one peer's replay, in environment steps; 0 without a replay."""

    # --- For other threads ---

    def begin_with(self, learner: Leaves, replay: SavedReplay | None) -> None:
        """Sets what the peers begin with: the same learner, and each its own share of the replay."""
        self._initial = InitialState(learner, replay)

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Lets all peers continue from a checkpoint, each from its share. Call it before the first `resume`."""
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        self._random = np.random.default_rng((self._config.seed, Stream.EXCHANGES, self.env_steps))
        for peer, env_steps in zip(self._peers, split_evenly(self.env_steps, len(self._peers)), strict=True):
            peer.env_steps, peer.learner_steps = env_steps, self.learner_steps
        self.begin_with(leaves_of(state["learner"]), state.get("replay"))

    @property
    def counters(self) -> dict[str, Any]:
        """The counts that `restore` needs in addition to the state and to the numbers of steps."""
        return {"replay_starts_at": sum(peer.replay_starts_at for peer in self._peers)}

    @property
    def num_ready_peers(self) -> int:
        """Number of peers that train."""
        return sum(peer.stage == "training" for peer in self._peers)

    def snapshots(self) -> list[Leaves]:
        """Returns the newest parameters of each peer that has trained, unless they are lost with their node."""
        with self._lock:
            snapshots = [peer.snapshot.reference for peer in self._peers if peer.snapshot is not None]
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
        for peer in self._peers:
            process = self._processes[peer.number]
            if peer.stage == "absent":
                yield None
            else:
                yield self._value_of(process, RemotePeer.newest_state, gives_up=True)

    def learners(self) -> Iterator[tuple[int, Leaves] | None]:
        """Yields what `GossipPeer.learner` returns, for each peer; None for a peer that doesn't train.

        Raises:
          StateIsLost: as `states` does.
        """
        for peer in self._peers:
            if peer.stage != "training":
                yield None
            else:
                yield self._value_of(self._processes[peer.number], RemotePeer.newest_learner, gives_up=True)

    def share_of_newest_checkpoint(self, number: int) -> SavedReplay | None:
        """Returns a peer's share of the replay in the newest checkpoint; None if there is no such replay."""
        newest = self._read_replay and self._of_newest_checkpoint(self._read_replay)
        return share_of(newest[0], self._topology.actor_pool, number) if newest else None

    # --- What the base class asks ---

    def _new_stats(self) -> GossipStats:
        return GossipStats(self._topology.num_processes)

    def _resources(self) -> list[Mapping[str, float]]:
        return [ONE_CPU] * self._topology.num_processes

    def _missing(self) -> RemoteProcess | None:
        return next((self._processes[peer.number] for peer in self._peers if peer.stage == "absent"), None)

    def _vital(self) -> list[RemoteProcess]:
        return []  # a checkpoint can do without any one peer: it holds the state of those that are ready

    def _is_busy(self) -> bool:
        return any(peer.num_in_flight for peer in self._peers)

    def _issue(self) -> None:
        self._begin_newcomers()
        self._start_exchanges()
        self._request_chunks()

    def _start_processes(self) -> None:
        resources, environment = _needs_of_one_peer(self._topology)
        for i in range(self._topology.num_processes):
            arguments = (peer_config(self._config, i, is_in_graph=self._is_in_graph), self._make_run)
            on_lost = functools.partial(self._on_lost, i)
            process = self._make_process(f"peer {i}", RemotePeer, arguments, resources, environment, on_lost)
            self._processes.append(self._supervisor.add(process))
            self._peers.append(PeerRecord(i))
            self._prepare(self._peers[i])

    # --- Peers that come and go ---

    def _on_lost(self, number: int) -> None:
        """Forgets what a lost peer was about to do.

        Its half of a pending exchange is dropped. If the other peer has been given its half already, it still moves
        half of the way towards what the lost peer had learned, which does no harm. The sum over the peers changes in
        any case, because the replacement begins with another peer's parameters.
        """
        peer = self._peers[number]
        peer.forget_process()
        self._prepare(peer)

    def _prepare(self, peer: PeerRecord) -> None:
        def on_prepared(_: None) -> None:
            peer.stage = "prepared"

        self._supervisor.submit(self._processes[peer.number], RemotePeer.prepare, on_reply=on_prepared)

    def _begin_newcomers(self) -> None:
        """Starts the training of every peer that is prepared, as a copy of another peer if there is one."""
        newcomers = [peer for peer in self._peers if peer.stage == "prepared"]
        if not newcomers:
            return
        for peer in newcomers:
            self._begin(peer, choose_donor(self._peers, self._random))
        assert self._initial is not None
        # The initial replay is for the first process of each peer. A replacement reads its share of a checkpoint.
        self._initial = self._initial._replace(replay=None)

    def _begin(self, peer: PeerRecord, donor: PeerRecord | None) -> None:
        process = self._processes[peer.number]
        learner, source = self._learner_for(peer, donor)
        replay = self._replay_for(peer)
        num_held = 0 if replay is None else num_steps(replay)
        num_lost = max(0, min(peer.env_steps - peer.replay_starts_at, self._replay_capacity) - num_held)
        # The warm-up counts only the steps that the replay holds: the loss of a batch from an empty one is NaN.
        peer.replay_starts_at = max(0, peer.env_steps - num_held)
        start = StartingPoint(peer.env_steps, peer.learner_steps, peer.replay_starts_at)
        peer.stage, peer.exchanged_at = "beginning", peer.learner_steps

        def on_begun(_: None) -> None:
            peer.stage = "training"
            if process.failed_at:
                lost = f"; {num_lost} transitions of its replay are lost, {num_held} were restored"
                kept = lost if self._replay_capacity else ""
                logger.warning(
                    "%s continues from its environment step %d, %s%s", process.name, peer.env_steps, source, kept
                )

        def on_dropped() -> None:  # the donor was lost before its learner arrived: choose another
            if peer.stage == "beginning":
                peer.stage = "prepared"

        self._supervisor.submit(
            process, RemotePeer.begin_from, start, learner, Reference(replay), on_reply=on_begun, on_dropped=on_dropped
        )

    def _learner_for(self, peer: PeerRecord, donor: PeerRecord | None) -> tuple[Reference[Leaves], str]:
        """Returns leaves of the learner that a peer begins with, and in words their source."""
        if donor is not None:
            process = self._processes[donor.number]
            learner = Reference[Leaves]()
            self._supervisor.submit(process, RemotePeer.leaves_of_learner, results=[learner])
            return learner, f"as a copy of {process.name}"
        has_failed = self._processes[peer.number].failed_at
        if has_failed and (newest := self._of_newest_checkpoint(self._read_learner)):
            return Reference(newest[0]), "from the newest checkpoint, because no other peer is ready"
        assert self._initial is not None
        return Reference(self._initial.learner), "with its initial parameters, because no other peer is ready"

    def _replay_for(self, peer: PeerRecord) -> SavedReplay | None:
        """Returns the replay that a peer begins with; None for an empty one."""
        assert self._initial is not None
        if self._initial.replay is not None:
            return share_of(self._initial.replay, self._topology.actor_pool, peer.number)
        has_failed = self._processes[peer.number].failed_at
        return self.share_of_newest_checkpoint(peer.number) if has_failed else None

    # --- Exchanges and chunks ---

    def _start_exchanges(self) -> None:
        """Decides which pairs exchange. Each side takes its averaging step at the start of its next chunk."""
        for pair in draw_pairs(self._peers, self._topology.gossip_period_learner_steps, self._random):
            begin_exchange(*pair)
            self._stats.num_exchanges += 1

    def _request_chunks(self) -> None:
        num_in_flight = sum(peer.num_in_flight for peer in self._peers)
        num_left = math.ceil((self._config.env_steps - self.env_steps) / self._env_steps_per_chunk)
        for peer in chunks_to_request(self._peers, num_left - num_in_flight):
            self._request_chunk(peer)

    def _request_chunk(self, peer: PeerRecord) -> None:
        exchange, peer.exchange = peer.exchange, None
        peer.num_in_flight += 1
        self._num_chunk_requests += 1
        peer.last_requested = self._num_chunk_requests

        def on_ended() -> None:
            peer.num_in_flight -= 1
            if exchange is not None:  # the newest snapshot contains the exchange now, or the exchange was dropped
                peer.is_averaging = False

        def on_arrived(reply: tuple[PeerChunkStats, Reference[Leaves]]) -> None:
            on_ended()
            stats, snapshot = reply
            peer.snapshot = Snapshot(stats.learner_steps, snapshot)
            self._count(peer, stats)

        process, num_env_steps = self._processes[peer.number], self._env_steps_per_chunk
        if exchange is None:
            self._supervisor.submit(
                process, RemotePeer.take_chunk, num_env_steps, on_reply=on_arrived, results=[Reference()],
                on_dropped=on_ended,
            )  # fmt: skip
        else:  # if a node leaves with one of the two snapshots, the chunk is dropped; nothing is wrong with the peer
            self._supervisor.submit(
                process, RemotePeer.average_and_take_chunk, num_env_steps, exchange.own.learner_steps,
                exchange.own.reference, exchange.other, on_reply=on_arrived, results=[Reference()], on_dropped=on_ended,
            )  # fmt: skip

    def _count(self, peer: PeerRecord, chunk: PeerChunkStats) -> None:
        stats, env_steps = self._stats, sum(progress.new_env_steps for progress in chunk.progress)
        peer.env_steps += env_steps
        peer.learner_steps = chunk.learner_steps
        self.env_steps += env_steps
        self.learner_steps = sum(each.learner_steps for each in self._peers) // len(self._peers)
        stats.progress += chunk.progress
        stats.peer_env_steps[peer.number] += env_steps
        stats.received_bytes += chunk.received_bytes
        if chunk.staleness is not None:
            stats.staleness.append(chunk.staleness)


def _needs_of_one_peer(topology: GossipConfig) -> tuple[Mapping[str, float], Mapping[str, str]]:
    """Returns a peer's resources on Ray, and its environment variables."""
    num_peers, num_devices = topology.num_processes, topology.devices_per_process
    resources = default_resources(num_peers * num_devices)
    if "GPU" in resources:
        return {**resources, "GPU": num_devices}, {}
    return resources, ON_CPU if num_peers > 1 else {"JAX_PLATFORMS": "cpu"}


def num_steps(replay: SavedReplay) -> int:
    """Returns how many environment steps a replay of one segment holds, without final observations."""
    held = np.asarray(replay.ring.rows.outcome)[: int(replay.ring.size[0])]  # a ring fills from its first row
    return int(np.sum(held != NO_STEP))
