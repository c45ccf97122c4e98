"""The decisions of gossip: when peers train, which of them exchange parameters, and whom a new peer copies.

`GossipMachine.handle` has the whole of it: what happens when a peer replies, gets lost or comes back, and what may be
requested when it is the machine's turn. `director` carries out the requests.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from qfleet.config import GossipConfig, TrainConfig
from qfleet.core.keys import Stream
from qfleet.core.replay import SavedReplay
from qfleet.runtime.records import Progress
from qfleet.topologies.fleet.machine import Machine, tell_of_loss
from qfleet.topologies.fleet.messages import (
    CallRequest,
    Dropped,
    Event,
    LearnerFound,
    Lost,
    ProcessId,
    ReadLearner,
    ReadReplay,
    ReplayFound,
    Replied,
    Request,
    Restored,
    Started,
    Turn,
    Warn,
)
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.stats import DirectorStats
from qfleet.topologies.gossip.averaging import Leaves, split_evenly
from qfleet.topologies.gossip.peer import PeerChunkStats, StartingPoint
from qfleet.topologies.gossip.peer_records import (
    Exchange,
    PeerRecord,
    Snapshot,
    begin_exchange,
    chunks_to_request,
    draw_pairs,
)

# --- Requests ---


@dataclasses.dataclass(frozen=True, eq=False)
class Prepare(CallRequest[None]):
    """Compile and start the run of a peer."""


@dataclasses.dataclass(frozen=True, eq=False)
class CopyLearner(CallRequest[Reference[Leaves]]):
    """Return the leaves of the learner, for another peer to begin with."""


@dataclasses.dataclass(frozen=True, eq=False)
class BeginFrom(CallRequest[None]):
    """Begin to train."""

    start: StartingPoint
    learner: Reference[Leaves]
    replay: Reference[SavedReplay | None]
    source: str
    """Where the learner comes from, in words."""


@dataclasses.dataclass(frozen=True, eq=False)
class TakeChunk(CallRequest[tuple[PeerChunkStats, Reference[Leaves]]]):
    """Take an averaging step if there is an exchange, train for one chunk, and return a snapshot."""

    env_steps: int
    exchange: Exchange | None


# --- The machine ---


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


class GossipMachine(Machine[GossipStats]):
    """Decides about the peers: which chunks they take, which pairs exchange, and what a new process begins with."""

    env_steps = 0
    learner_steps = 0

    learner: Reference[Leaves]
    """Learner that peers begin with if there is none to copy. The director sets it before the first turn."""

    def __init__(self, config: TrainConfig, env_steps_per_chunk: int) -> None:
        """Begins with processes that aren't ready; `env_steps_per_chunk` is the size of one chunk of one peer."""
        self.config, self._topology = config, config.topology_as(GossipConfig)
        self.peers = [PeerRecord(ProcessId("peer", i)) for i in range(self._topology.num_processes)]
        self._env_steps_per_chunk, self._num_requests = env_steps_per_chunk, 0
        self._learner_source = "with its initial parameters"
        self._random = np.random.default_rng((config.seed, Stream.EXCHANGES))
        has_replay = config.agent.replay != "none"
        self._replay_capacity = config.agent.replay_capacity // len(self.peers) if has_replay else 0
        """Capacity of one peer's replay, in environment steps; 0 without a replay."""

    @property
    def is_busy(self) -> bool:
        """Whether any peer is taking a chunk."""
        return any(peer.num_in_flight for peer in self.peers)

    @property
    def counters(self) -> dict[str, int]:
        """The counts of a checkpoint, beside the numbers of steps."""
        return {"replay_starts_at": sum(peer.replay_starts_at for peer in self.peers)}

    def handle(self, event: Event) -> list[Request]:
        """Takes notice of an event, and returns what to request, in this order."""
        match event:
            case Started():
                return [Prepare(peer.process) for peer in self.peers]
            case Restored():
                self._restore(event)
            case Turn():
                return self._take_turn()

            case Lost(process):
                self._peer(process).lose_process()
                return [Prepare(process)]
            case Replied(Prepare(process)):
                self._peer(process).stage = "prepared"
            case LearnerFound(_, learner):
                if learner is not None:
                    self.learner, self._learner_source = learner, "from the newest checkpoint"
                return self._begin_all()
            case ReplayFound(process, share):
                peer = self._peer(process)
                num_held = min(peer.env_steps - peer.replay_starts_at, self._replay_capacity)
                peer.refill(share)
                news = [tell_of_loss(event, num_held)] if self._replay_capacity else []
                return [*news, *self._begin_from(peer)]
            case Replied(BeginFrom(process, source=source)):
                peer = self._peer(process)
                peer.stage, peer.share = "training", None
                if peer.was_lost:
                    return [Warn(f"{process.name} continues from its environment step {peer.env_steps}, {source}")]
            case Dropped(BeginFrom(process)):
                if self._peer(process).stage == "beginning":  # its donor was lost: it will get another
                    self._peer(process).stage = "prepared"

            case Replied(TakeChunk() as chunk, (stats, params)):
                self._chunk_ended(chunk)
                self._count(self._peer(chunk.process), stats, params)
            case Dropped(TakeChunk() as chunk):  # its process was lost, or a snapshot of its exchange
                self._chunk_ended(chunk)
        return []

    def _peer(self, process: ProcessId) -> PeerRecord:
        return self.peers[process.number]

    def _take_turn(self) -> list[Request]:
        """Requests all that may be under way now."""
        newcomers = self._begin_newcomers()
        for first, second in draw_pairs(self.peers, self._topology.gossip_period_learner_steps, self._random):
            begin_exchange(first, second)
            self.stats.num_exchanges += 1
        return [*newcomers, *self._request_chunks()]

    # --- Peers that come and go ---

    @property
    def _newcomers(self) -> list[PeerRecord]:
        return [peer for peer in self.peers if peer.stage == "prepared"]

    @property
    def _donors(self) -> list[PeerRecord]:
        return [peer for peer in self.peers if peer.snapshot is not None]

    def _begin_newcomers(self) -> list[Request]:
        """Has every peer that is prepared begin; if there is none to copy, the newest checkpoint is read first."""
        if not self._donors and any(peer.was_lost for peer in self._newcomers):
            return [ReadLearner()]
        return self._begin_all()

    def _begin_all(self) -> list[Request]:
        return [request for peer in self._newcomers for request in self._begin(peer)]

    def _begin(self, peer: PeerRecord) -> list[Request]:
        """Has a peer begin to train, as a copy of another one at random if any has trained."""
        donors = self._donors
        peer.donor = donors[self._random.integers(len(donors))].process if donors else None
        peer.stage, peer.exchanged_at = "beginning", peer.learner_steps
        return [ReadReplay(peer.process)] if peer.was_lost else self._begin_from(peer)

    def _begin_from(self, peer: PeerRecord) -> list[Request]:
        requests, learner = list[Request](), self.learner
        source = f"{self._learner_source}, because no other peer is ready"
        if peer.donor is not None:
            learner, source = Reference(), f"as a copy of {peer.donor.name}"
            requests.append(CopyLearner(peer.donor, results=[learner]))
        start = StartingPoint(peer.env_steps, peer.learner_steps, peer.replay_starts_at)
        replay: Reference[Any] = peer.share.replay if peer.share else Reference(None)
        return [*requests, BeginFrom(peer.process, start, learner, replay, source)]

    def _restore(self, event: Restored) -> None:
        self.env_steps, self.learner_steps, self.learner = event.env_steps, event.learner_steps, event.learner
        self._random = np.random.default_rng((self.config.seed, Stream.EXCHANGES, self.env_steps))
        for i, env_steps in enumerate(split_evenly(self.env_steps, len(self.peers))):
            peer = self.peers[i]
            peer.env_steps, peer.learner_steps = env_steps, self.learner_steps
            peer.refill(event.shares[i] if event.shares else None)

    # --- Chunks ---

    def _request_chunks(self) -> list[TakeChunk]:
        num_in_flight = sum(peer.num_in_flight for peer in self.peers)
        num_left = math.ceil((self.config.env_steps - self.env_steps) / self._env_steps_per_chunk)
        return [self._request_chunk(peer) for peer in chunks_to_request(self.peers, num_left - num_in_flight)]

    def _request_chunk(self, peer: PeerRecord) -> TakeChunk:
        exchange, peer.exchange = peer.exchange, None
        peer.num_in_flight += 1
        self._num_requests += 1
        peer.last_requested = self._num_requests
        return TakeChunk(peer.process, self._env_steps_per_chunk, exchange, results=[Reference()])

    def _chunk_ended(self, chunk: TakeChunk) -> None:
        peer = self._peer(chunk.process)
        peer.num_in_flight -= 1
        if chunk.exchange is not None:  # the newest snapshot will contain the exchange, or the exchange was dropped
            peer.is_averaging = False

    def _count(self, peer: PeerRecord, chunk: PeerChunkStats, params: Reference[Leaves]) -> None:
        stats, env_steps = self.stats, sum(progress.new_env_steps for progress in chunk.progress)
        peer.snapshot = Snapshot(chunk.learner_steps, params)
        peer.env_steps += env_steps
        peer.learner_steps = chunk.learner_steps
        self.env_steps += env_steps
        self.learner_steps = sum(each.learner_steps for each in self.peers) // len(self.peers)
        stats.progress += chunk.progress
        stats.peer_env_steps[peer.process.number] += env_steps
        stats.received_bytes += chunk.received_bytes
        if chunk.staleness is not None:
            stats.staleness.append(chunk.staleness)
