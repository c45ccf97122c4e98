"""Which peers exchange and which are asked for chunks, worked by hand."""

import numpy as np
import pytest

from qfleet.topologies.fleet.messages import ProcessId
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.gossip.peer_records import PeerRecord, Snapshot, chunks_to_request, draw_pairs


class Scripted(np.random.Generator):
    """A random generator whose numbers are given: the order of the peers that are due, then an index for each draw."""

    def __init__(self, order: tuple[int, ...] = (), draws: tuple[int, ...] = ()) -> None:
        super().__init__(np.random.PCG64(0))
        self.order, self.draws, self.highs = order, list(draws), []

    def permutation(self, length: int) -> tuple[int, ...]:
        assert length == len(self.order)
        return self.order

    def integers(self, high: int) -> int:
        self.highs.append(high)
        return self.draws.pop(0)


def trained(number: int, learner_steps: int = 0, **settings) -> PeerRecord:
    """A peer that has sent a snapshot."""
    snapshot = Snapshot(learner_steps, Reference())
    process = ProcessId("peer", number)
    return PeerRecord(process, stage="training", learner_steps=learner_steps, snapshot=snapshot, **settings)


def numbers(pairs: list[tuple[PeerRecord, PeerRecord]]) -> list[tuple[int, int]]:
    return [(first.process.number, second.process.number) for first, second in pairs]


# --- Pairs ---


def test_each_peer_that_is_due_gets_one_partner_in_the_order_drawn():
    peers = [trained(i, learner_steps) for i, learner_steps in enumerate((10, 3, 12, 0, 11))]
    # Peers 0, 2 and 4 are due. Peer 2 is first and draws from (0, 1, 3, 4); peer 0 is next and draws from (1, 4).
    random = Scripted(order=(1, 0, 2), draws=(2, 1))
    assert numbers(draw_pairs(peers, 10, random)) == [(2, 3), (0, 4)]
    assert random.highs == [4, 2], "peer 4 has a partner by then, so nothing is drawn for it"


def test_steps_since_the_last_exchange_count_and_not_those_in_total():
    peers = [trained(0, 100, exchanged_at=91), trained(1, 100, exchanged_at=95)]
    assert draw_pairs(peers, 10, Scripted()) == []
    peers[0].learner_steps = 101
    assert numbers(draw_pairs(peers, 10, Scripted(order=(0,), draws=(0,)))) == [(0, 1)]


@pytest.mark.parametrize("change", [{"is_averaging": True}, {"snapshot": None}])
def test_a_peer_whose_snapshot_lacks_an_exchange_or_that_has_none_is_in_no_pair(change):
    peers = [trained(i, 10) for i in range(3)]
    for name, value in change.items():
        setattr(peers[1], name, value)
    assert numbers(draw_pairs(peers, 10, Scripted(order=(1, 0), draws=(0,)))) == [(2, 0)]


def test_the_last_of_an_odd_number_finds_no_partner():
    peers = [trained(i, 10) for i in range(3)]
    assert numbers(draw_pairs(peers, 10, Scripted(order=(0, 1, 2), draws=(0,)))) == [(0, 1)]
    assert draw_pairs(peers[:1], 10, Scripted(order=(0,))) == []


# --- Chunks ---


def test_the_peer_asked_longest_ago_comes_first_and_each_gets_a_first_chunk_before_any_a_second():
    peers = [trained(0, last_requested=7), trained(1, last_requested=5), trained(2, last_requested=6)]
    assert [peer.process.number for peer in chunks_to_request(peers, 5)] == [1, 2, 0, 1, 2]


def test_no_more_than_two_chunks_of_a_peer_are_in_flight_and_only_of_those_that_train():
    peers = [
        trained(0, num_in_flight=2),
        trained(1, num_in_flight=1),
        PeerRecord(ProcessId("peer", 2), stage="beginning"),
        trained(3),
    ]
    assert [peer.process.number for peer in chunks_to_request(peers, 100)] == [1, 3, 3]


@pytest.mark.parametrize("num_wanted", [0, -3])
def test_nothing_is_requested_that_the_run_does_not_need(num_wanted):
    assert chunks_to_request([trained(0)], num_wanted) == []
