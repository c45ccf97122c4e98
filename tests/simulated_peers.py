"""A model of the peers of gossip, and the rig of their director.

A peer's parameters are one number, and a snapshot says how many exchanges it contains.
"""

from typing import Any, NamedTuple

import numpy as np
from fleet_simulator import Host
from invariants import require
from simulated_replay import saved_replay
from simulated_rig import Rig

from qfleet.config import TrainConfig
from qfleet.topologies.base import StateIsLost
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import RemoteProcess
from qfleet.topologies.fleet.replay_shares import join_shards
from qfleet.topologies.gossip.averaging import Leaves, mean_of
from qfleet.topologies.gossip.director import GossipDirector
from qfleet.topologies.gossip.peer import PeerChunkStats, StartingPoint
from qfleet.topologies.gossip.peer_records import CHUNKS_AHEAD, PeerRecord
from qfleet.topologies.gossip.remote import RemotePeer

ENV_STEPS_PER_CHUNK = 4
LEARNER_STEPS_PER_CHUNK = 2
CHUNKS = ("take_chunk", "average_and_take_chunk")


class Steps(NamedTuple):
    """Progress of a chunk, as far as the director reads it."""

    new_env_steps: int


class SnapshotId(NamedTuple):
    """A snapshot, by what it is: it stands for the leaves of the parameters."""

    peer: int
    host: int
    """Number of its process."""
    num_chunks: int
    num_exchanges: int
    """Averaging steps that it contains."""
    value: float


class PeerLedger:
    """What has happened in truth, since a director started."""

    def __init__(self) -> None:
        self.applied: dict[tuple[SnapshotId, SnapshotId], PeerModel] = {}
        """Averaging steps: own snapshot, the other's, and who has taken it."""
        self.num_chunks_made = 0
        self.drift = 1.0
        """Scale of what a peer learns in a chunk."""
        self.begun_with = 0.0
        """Sum of the parameters that all peers began with. Who comes later begins with those of another."""
        self.learned = 0.0
        """Sum of what all peers have learned."""


class PeerModel:
    def __init__(self, ledger: PeerLedger, host: Host, config: TrainConfig, make_run: Any) -> None:
        self.ledger, self.host, self.number = ledger, host, int(host.name.split()[-1])
        self.stage = "made"
        self.value, self.steps, self.rows = 0.0, 0, list[int]()
        self._num_chunks = self._num_exchanges = 0

    def prepare(self) -> None:
        require("a peer is prepared once", self.stage == "made")
        self.stage = "prepared"

    def begin(self, start: StartingPoint, learner: Reference, replay: Reference) -> None:
        require("a peer begins once, when it is prepared", self.stage == "prepared", self.stage)
        self.stage, self.start, self.steps = "training", start, start.learner_steps
        self.value = float(learner.value[0])
        self.ledger.begun_with += self.value
        if replay.value is not None:
            size = int(replay.value.ring.size[0])
            self.rows = replay.value.ring.rows.obs[:size, 0].tolist()
        num_rows = min(start.env_steps, len(self.rows))  # a resumed run divides its steps evenly over the peers
        is_known = start.env_steps - start.replay_starts_at == num_rows
        require("a peer has the rows that it is thought to have", is_known, start, num_rows)
        self.more_rows = len(self.rows) - num_rows

    def take_chunk(self, num_env_steps: int) -> tuple[PeerChunkStats, Reference]:
        return self._take_chunk(num_env_steps, None)

    def average_and_take_chunk(
        self, num_env_steps: int, learner_steps_then: int, own: Reference, other: Reference
    ) -> tuple[PeerChunkStats, Reference]:
        mine, theirs = own.value, other.value
        is_own = mine.host == self.host.number and mine.peer == self.number
        require("a peer averages by a snapshot of its own", is_own, mine, self.number)
        contains_all = mine.num_exchanges == self._num_exchanges
        require("no two averaging steps are taken from one snapshot", contains_all, mine, self._num_exchanges)
        require("an exchange is applied once on each side", (mine, theirs) not in self.ledger.applied)
        self.ledger.applied[mine, theirs] = self
        self._num_exchanges += 1
        self.value += (theirs.value - mine.value) / 2
        return self._take_chunk(num_env_steps, self.steps - learner_steps_then)

    def _take_chunk(self, num_env_steps: int, staleness: int | None) -> tuple[PeerChunkStats, Reference]:
        require("a peer has begun before it trains", self.stage == "training", self.stage)
        learned = self.ledger.drift * self.host.world.random.gauss(0.0, 1.0)
        self.value += learned
        self.ledger.learned += learned
        self.ledger.num_chunks_made += 1
        self._num_chunks += 1
        self.steps += LEARNER_STEPS_PER_CHUNK
        self.rows += [self.number] * num_env_steps
        snapshot = SnapshotId(self.number, self.host.number, self._num_chunks, self._num_exchanges, self.value)
        return PeerChunkStats([Steps(num_env_steps)], self.steps, staleness, 0), Reference(snapshot)  # type: ignore[list-item]

    def _learner(self) -> Leaves:
        return [np.float64(self.value), np.array(self.steps)]  # type: ignore[list-item]

    def learner(self) -> Reference:
        return Reference((self.steps, self._learner()))

    def copy_learner(self) -> Reference:
        return Reference(self._learner())

    def state(self) -> Reference:
        is_training = self.stage == "training"
        return Reference((self.steps, self._learner(), saved_replay([self.rows])) if is_training else None)


class GossipRig(Rig):
    """A director of gossip."""

    director: GossipDirector
    ledger: PeerLedger

    def make_director(self) -> GossipDirector:
        self.ledger = PeerLedger()
        self._began = self.checkpoint[1]["env_steps"] if self.checkpoint else 0
        self._steps = [0] * self.config.topology.num_processes
        self.world.models[RemotePeer] = lambda *arguments: PeerModel(self.ledger, *arguments)

        def read_learner(state: dict[str, Any], _: Any) -> Leaves:
            return state["learner"]

        def read_replay(state: dict[str, Any], _: Any) -> Any:
            return state["replay"]

        make_run: Any = None
        director = GossipDirector(
            self.config, make_run, ENV_STEPS_PER_CHUNK, read_learner, read_replay, is_in_graph=True
        )
        director.begin_with([np.float64(0.0), np.array(0)])  # type: ignore[arg-type]
        return director

    @property
    def peers(self) -> list[tuple[PeerRecord, RemoteProcess]]:
        """What the machine knows of each peer, and its process."""
        return [(peer, self.director._processes[peer.process]) for peer in self.director.machine.peers]

    def check(self) -> None:
        director, ledger = self.director, self.ledger
        for peer, process in self.peers:
            num_chunks = sum(self.under_way[process, method] for method in CHUNKS)
            require("what is thought to be under way is under way", num_chunks == peer.num_in_flight, num_chunks, peer)
            require("nothing in flight exceeds its bound", num_chunks <= CHUNKS_AHEAD, num_chunks)
            require("versions never go back", peer.learner_steps >= self._steps[peer.process.number], peer)
            self._steps[peer.process.number] = peer.learner_steps
        counted = (director.env_steps - self._began) / ENV_STEPS_PER_CHUNK
        require("no row counts that isn't there, or twice", counted <= ledger.num_chunks_made, counted)
        env_steps = sum(peer.env_steps for peer in director.machine.peers)
        require("env_steps are those of all peers", env_steps == director.env_steps, env_steps, director.env_steps)

    def check_at_rest(self) -> None:
        self.check_exchanges()
        for peer, process in self.peers:
            model = process.handle.model
            if peer.stage == "training":
                num_counted = peer.env_steps - peer.replay_starts_at + model.more_rows
                require("every row counts", num_counted == len(model.rows), num_counted, len(model.rows))

    def check_exchanges(self) -> None:
        """Requires that both sides of each exchange are applied, unless one of them was lost."""
        hosts = {process.handle.number: peer for peer, process in self.peers}
        for (mine, theirs), model in self.ledger.applied.items():
            peer = hosts.get(theirs.host)
            if peer is None or model.host.number not in hosts or (theirs, mine) in self.ledger.applied:
                continue
            exchange = peer.exchange
            is_pending = exchange is not None and exchange.own.params.place.value == theirs
            require("an exchange is applied on both sides", is_pending or not self.world.is_one_machine, mine, theirs)

    def progress(self) -> tuple[int, ...]:
        return self.director.env_steps, self.director.learner_steps, len(self.ledger.applied)

    def saved(self) -> tuple[int, dict[str, Any]]:
        states = list(self.director.states())
        learners = [state[:2] for state in states if state is not None]
        if not learners:
            raise StateIsLost("no peer is ready")
        shares = [self.director.share_of_newest_checkpoint(i) or saved_replay([[]]) for i in range(len(states))]
        parts = [share if state is None else state[2] for state, share in zip(states, shares, strict=True)]
        furthest = max(range(len(learners)), key=lambda i: learners[i][0])
        return self.director.learner_steps, {
            "learner": mean_of([leaves for _, leaves in learners], furthest),
            "replay": join_shards(parts, self.config.topology.actor_pool),
        }
