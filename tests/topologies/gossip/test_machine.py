"""The machine of gossip: events in, requests out."""

import types
from typing import Any

import numpy as np
import pytest
from driven_machine import DrivenMachine
from small_gossip import config_of

from qfleet.topologies.fleet.messages import (
    Dropped,
    LearnerFound,
    Paused,
    ProcessId,
    ReadLearner,
    ReadReplay,
    Restored,
    SavedShare,
)
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.gossip.machine import (
    BeginFrom,
    CopyLearner,
    GossipMachine,
    GossipStats,
    Prepare,
    TakeChunk,
)
from qfleet.topologies.gossip.peer import PeerChunkStats, StartingPoint
from qfleet.topologies.gossip.peer_records import Exchange, PeerRecord

ENV_STEPS, LEARNER_STEPS = 8, 2  # of one chunk
PERIOD = 4


class Peers(DrivenMachine):
    """A machine with peers that do nothing but count."""

    def __init__(self, num_peers: int = 2, **settings: Any) -> None:
        defaults = {"env_steps": 10**9, "gossip_period_learner_steps": PERIOD, "replay_capacity": 1_024 * num_peers}
        config = config_of(num_processes=num_peers, num_envs=num_peers, **{**defaults, **settings})
        machine = GossipMachine(config, ENV_STEPS)
        machine.stats, machine.learner = GossipStats(num_peers), Reference()
        replies = {
            BeginFrom: self.begin, TakeChunk: self.take_chunk, CopyLearner: lambda request: request.results[0]
        }  # fmt: skip
        self.steps: dict[ProcessId, int] = {}
        super().__init__(machine, replies, [])

    def begin(self, request: BeginFrom) -> None:
        self.steps[request.process] = request.start.learner_steps

    def take_chunk(self, request: TakeChunk) -> tuple[PeerChunkStats, Reference]:
        process = request.process
        staleness = request.exchange and self.steps[process] - request.exchange.own.learner_steps
        self.steps[process] += LEARNER_STEPS
        progress: Any = types.SimpleNamespace(new_env_steps=ENV_STEPS)
        return PeerChunkStats([progress], self.steps[process], staleness, 100), request.results[0]

    def peer(self, number: int) -> PeerRecord:
        return self.machine.peers[number]

    def run(self, num_turns: int) -> None:
        """Lets every peer answer one request after each turn."""
        for _ in range(num_turns):
            self.turn()
            for process in list(self.waiting):
                self.answer(process)

    def rest(self) -> None:
        self.tell(Paused())
        self.answer_all("peer")


def started(num_peers: int = 2, **settings: Any) -> Peers:
    """Peers of which each has trained, and does nothing at the moment."""
    peers = Peers(num_peers, **settings)
    peers.run(8)
    peers.rest()
    return peers


def test_all_begin_with_one_learner_and_each_has_two_chunks_ahead_which_come_in_turn():
    peers = Peers(3)
    assert [request.process.number for request in peers.requested(Prepare)] == [0, 1, 2]
    peers.turn()
    assert peers.requested(BeginFrom) == []
    peers.answer_all("peer")
    peers.turn()
    begins = peers.requested(BeginFrom)
    assert [(begin.process.number, begin.start) for begin in begins] == [(i, StartingPoint(0, 0, 0)) for i in range(3)]
    assert all(begin.learner is peers.machine.learner and begin.replay.value is None for begin in begins)
    assert peers.requested(TakeChunk, CopyLearner, ReadLearner, ReadReplay) == []
    peers.answer_all("peer")
    peers.turn()
    assert [chunk.process.number for chunk in peers.requested(TakeChunk)] == [0, 1, 2, 0, 1, 2]
    assert all(chunk.exchange is None and chunk.env_steps == ENV_STEPS for chunk in peers.requested(TakeChunk))
    assert peers.warnings == [] and peers.machine.is_busy


def test_nothing_is_requested_in_a_pause_and_what_arrives_counts():
    peers = started()
    num_requests, env_steps = len(peers.log), peers.machine.env_steps
    assert not peers.machine.is_busy
    peers.turn()
    peers.rest()
    assert len(peers.log) == num_requests + 4 and not peers.machine.is_busy
    assert peers.machine.env_steps == env_steps + 4 * ENV_STEPS == sum(peers.machine.stats.peer_env_steps)
    assert peers.machine.learner_steps == peers.machine.env_steps // ENV_STEPS  # mean over two peers


def test_both_sides_of_an_exchange_get_the_same_two_snapshots_with_their_next_chunks():
    peers = started()
    snapshots = [peers.peer(i).snapshot for i in range(2)]
    num_before, num_chunks = peers.machine.stats.num_exchanges, len(peers.requested(TakeChunk))
    peers.turn()
    exchanges = {
        chunk.process.number: chunk.exchange for chunk in peers.requested(TakeChunk)[num_chunks:] if chunk.exchange
    }
    assert exchanges == {0: Exchange(snapshots[0], snapshots[1].params), 1: Exchange(snapshots[1], snapshots[0].params)}
    assert peers.machine.stats.num_exchanges == num_before + 1
    assert all(peers.peer(i).is_averaging and peers.peer(i).exchanged_at == snapshots[i].learner_steps for i in (0, 1))
    peers.answer(ProcessId("peer", 0))
    assert peers.peer(0).can_exchange and not peers.peer(1).can_exchange
    assert peers.machine.stats.staleness[-1] == 0, "the peer has taken no step since its snapshot"
    peers.turn()
    assert peers.machine.stats.num_exchanges == num_before + 1, "the other's snapshot lacks its last exchange"


def test_a_partner_need_not_be_due_and_a_peer_without_a_partner_goes_on_alone():
    peers = started()
    first, second = peers.machine.peers
    first.exchanged_at = first.learner_steps - PERIOD
    second.exchanged_at = second.learner_steps - 1
    second.is_averaging = True
    peers.turn()
    assert not first.is_averaging and first.exchange is None
    second.is_averaging = False
    peers.turn()
    assert first.is_averaging and second.is_averaging


def test_a_chunk_whose_exchange_is_lost_with_a_node_frees_its_peer_for_another():
    peers = started()
    peers.turn()
    chunk = peers.waiting[ProcessId("peer", 0)].popleft()
    assert chunk.exchange is not None
    peers.tell(Dropped(chunk, [chunk.exchange.other]))
    assert peers.peer(0).can_exchange and peers.peer(0).num_in_flight == 1
    assert peers.peer(0).snapshot == chunk.exchange.own


def test_a_peer_that_is_lost_comes_back_as_a_copy_of_one_that_has_trained():
    peers = started(3)
    donor, env_steps = ProcessId("peer", 2), peers.peer(0).env_steps
    peers.peer(1).snapshot = None  # as of a peer that has begun, and has not trained
    saved = SavedShare(Reference(), 10)
    peers.shares[ProcessId("peer", 0)] = saved
    peers.lose(ProcessId("peer", 0))
    lost = peers.peer(0)
    assert (lost.stage, lost.snapshot, lost.exchange, lost.can_exchange) == ("absent", None, None, False)
    assert lost.env_steps == env_steps, "what was counted stays counted"
    peers.answer_all("peer")
    peers.turn()
    (copy,), begin = peers.requested(CopyLearner), peers.requested(BeginFrom)[-1]
    assert copy.process == donor and [begin.learner] == copy.results and begin.replay is saved.replay
    assert begin.start == StartingPoint(env_steps, lost.learner_steps, env_steps - 10)
    assert peers.requested(ReadLearner) == []
    peers.answer_all("peer")
    assert peers.warnings == [
        f"peer 0 held {env_steps} transitions; 10 are back: from the checkpoint at environment step 0",
        f"peer 0 continues from its environment step {env_steps}, as a copy of peer 2",
    ]
    assert lost.stage == "training" and lost.share is None


def test_a_share_that_is_saved_before_the_replacement_begins_is_the_one_it_begins_with():
    """A checkpoint may be taken in a pause, and hold what the peer had told before it was lost."""
    peers = started()
    peers.lose(ProcessId("peer", 0))
    peers.rest()
    assert peers.requested(ReadReplay) == []
    peers.shares[ProcessId("peer", 0)] = saved = SavedShare(Reference(), 3)
    peers.turn()
    assert peers.requested(BeginFrom)[-1].replay is saved.replay


def test_peers_that_are_all_lost_go_on_from_the_newest_checkpoint_or_begin_anew():
    peers, learner = started(), Reference[Any]()
    initial = peers.machine.learner
    for found, expected, source in (
        (LearnerFound(0, None), initial, "with its initial parameters"),
        (LearnerFound(6, learner), learner, "from the newest checkpoint"),
    ):
        peers.learner = found
        for i in range(2):
            peers.lose(ProcessId("peer", i))
        peers.answer_all("peer")
        num_reads = len(peers.requested(ReadLearner))
        peers.turn()
        assert len(peers.requested(ReadLearner)) == num_reads + 1
        assert [begin.learner for begin in peers.requested(BeginFrom)[-2:]] == [expected] * 2
        peers.answer_all("peer")
        ending = f"{source}, because no other peer is ready"
        assert [each.endswith(ending) for each in peers.warnings].count(True) == 2
    assert peers.requested(CopyLearner) == []


def test_a_newcomer_whose_donor_is_lost_gets_another():
    peers = started(3)
    peers.lose(ProcessId("peer", 0))
    peers.answer_all("peer")
    peers.turn()
    (copy,), begin = peers.requested(CopyLearner), peers.waiting[ProcessId("peer", 0)].popleft()
    peers.lose(copy.process)
    peers.tell(Dropped(begin, begin.results))
    assert peers.peer(0).stage == "prepared"
    peers.turn()
    other = peers.requested(CopyLearner)[-1]
    assert other.process.number == 3 - copy.process.number
    peers.answer_all("peer")
    assert any(each.endswith(f"as a copy of {other.process.name}") for each in peers.warnings)


def test_no_more_chunks_are_requested_than_the_run_needs():
    peers = Peers(2, env_steps=ENV_STEPS * 5 - 1, warmup_env_steps=16)
    peers.run(20)
    assert len(peers.requested(TakeChunk)) == 5 and peers.machine.env_steps == ENV_STEPS * 5
    peers = Peers(2, env_steps=ENV_STEPS * 5, warmup_env_steps=16)
    peers.run(4)
    peers.lose(ProcessId("peer", 0))
    peers.run(20)
    assert peers.machine.env_steps == ENV_STEPS * 5, "a chunk that is lost is requested again"


def test_a_run_goes_on_from_the_counts_of_a_checkpoint_however_late_a_peer_is():
    peers, learner = Peers(2), Reference[Any]()
    shares = [SavedShare(Reference(), 20), SavedShare(Reference(), 15)]
    peers.tell(Restored(41, 12, 0, 0, 0, learner, shares))
    assert (peers.machine.env_steps, peers.machine.learner_steps) == (41, 12)
    assert peers.machine.counters == {"replay_starts_at": 1 + 5}
    for i, start in enumerate((StartingPoint(21, 12, 1), StartingPoint(20, 12, 5))):
        peers.answer(ProcessId("peer", i))
        peers.turn()
        begin = peers.requested(BeginFrom)[-1]
        assert (begin.process.number, begin.start, begin.learner) == (i, start, learner)
        assert begin.replay is shares[i].replay
    peers = Peers(2)
    peers.tell(Restored(41, 12, 41, 0, 0, learner, []))
    assert peers.machine.counters == {"replay_starts_at": 41}, "all warm up anew"


@pytest.mark.parametrize("seed", range(3))
def test_the_same_events_lead_to_the_same_requests(seed):
    def played() -> list[Any]:
        peers, random = Peers(4), np.random.default_rng(seed)
        for _ in range(300):
            peers.turn()
            process = list(peers.waiting)[random.integers(len(peers.waiting))]
            peers.answer(process)
            if random.random() < 0.01:
                peers.lose(process)
        return [*((type(each), getattr(each, "process", None)) for each in peers.log), peers.machine.counters]

    assert played() == played()
