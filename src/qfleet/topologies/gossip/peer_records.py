"""The peers as the machine of gossip knows them: which pairs exchange parameters, and whom to ask for chunks."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from qfleet.topologies.fleet.messages import ProcessId, SavedShare
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.gossip.averaging import Leaves

CHUNKS_AHEAD = 2
"""Chunks of one peer in flight at most: while the peer works on one, the next is already decided. An exchange travels
with the next chunk that is requested, so the snapshot that contains it comes back two chunks after the snapshot that it
was decided from."""


class Snapshot(NamedTuple):
    """A peer's parameters at the end of a chunk."""

    learner_steps: int
    """Learner steps that the peer had taken by then."""
    params: Reference[Leaves]
    """Leaves of the parameters."""


class Exchange(NamedTuple):
    """One side of an exchange: the two snapshots that a peer averages by."""

    own: Snapshot
    """The peer's own snapshot."""
    other: Reference[Leaves]
    """The other peer's."""


@dataclasses.dataclass(eq=False)
class PeerRecord:
    """What the machine knows about a peer."""

    process: ProcessId
    stage: Literal["absent", "prepared", "beginning", "training"] = "absent"
    was_lost: bool = False
    """Whether its process is a replacement."""
    env_steps: int = 0
    """Environment steps that it has taken; they stay counted if it is replaced."""
    learner_steps: int = 0
    donor: ProcessId | None = None
    """The peer whose learner its process begins with; None if there was none."""
    share: SavedShare | None = None
    """The saved replay that its process begins with; None for an empty one, or once it has begun."""
    replay_starts_at: int = 0
    """Its environment steps when its replay was last empty."""
    num_in_flight: int = 0
    """Chunks that were requested of it and have not come back."""
    last_requested: int = 0
    """Number of its newest request, counted over the requests to all peers."""
    exchanged_at: int = 0
    """Its learner steps when its last exchange was decided."""
    snapshot: Snapshot | None = None
    """Its newest snapshot; None before it has trained."""
    exchange: Exchange | None = None
    """The exchange to send with its next chunk, if there is one."""
    is_averaging: bool = False
    """Whether its newest snapshot does not contain its last exchange yet."""

    @property
    def can_exchange(self) -> bool:
        """Whether its snapshot contains all of its exchanges.

        Two averaging steps from the same snapshot would move the peer twice as far.
        """
        return self.snapshot is not None and not self.is_averaging

    def lose_process(self) -> None:
        """Forgets what belonged to its process. Its counts stay.

        Its half of a pending exchange is dropped. If the other peer has been given its half already, it still moves
        half of the way towards what the lost peer had learned, which does no harm. The sum over the peers changes in
        any case, because the replacement begins with another peer's parameters.
        """
        self.was_lost = True
        self.stage, self.snapshot, self.exchange, self.is_averaging = "absent", None, None, False

    def refill(self, share: SavedShare | None) -> None:
        """Has its process begin with a saved replay, or with an empty one."""
        self.share = share
        # The warm-up counts only the steps that the replay holds: the loss of a batch from an empty one is NaN.
        self.replay_starts_at = max(0, self.env_steps - (share.num_transitions if share else 0))


def draw_pairs(
    peers: Sequence[PeerRecord], period_learner_steps: int, random: np.random.Generator
) -> list[tuple[PeerRecord, PeerRecord]]:
    """Returns the pairs that exchange parameters now: each peer that is due, with a partner at random.

    A peer is due if it has taken a period of learner steps since its last exchange. Its partner need not be due. Each
    peer is in one pair at most, and only if it can exchange. A peer that finds no partner stays due.

    Args:
      peers: all peers.
      period_learner_steps: learner steps after which a peer is due.
      random: draws the order of the peers that are due, then a partner for each.
    """
    free = [peer for peer in peers if peer.can_exchange]
    due = [peer for peer in free if peer.learner_steps - peer.exchanged_at >= period_learner_steps]
    pairs = []
    for i in random.permutation(len(due)):
        peer = due[i]
        others = [other for other in free if other is not peer]
        if peer not in free or not others:
            continue
        partner = others[random.integers(len(others))]
        free.remove(peer)
        free.remove(partner)
        pairs.append((peer, partner))
    return pairs


def begin_exchange(first: PeerRecord, second: PeerRecord) -> None:
    """Has two peers exchange: each takes its averaging step at the start of its next chunk."""
    assert first.snapshot is not None and second.snapshot is not None
    first.exchange = Exchange(first.snapshot, second.snapshot.params)
    second.exchange = Exchange(second.snapshot, first.snapshot.params)
    for peer in (first, second):
        peer.is_averaging, peer.exchanged_at = True, peer.learner_steps


def chunks_to_request(peers: Sequence[PeerRecord], num_wanted: int) -> list[PeerRecord]:
    """Returns which peers to ask for one chunk each, in this order; a peer may appear more than once.

    The peer whose last request is the longest ago comes first. Every peer gets a first chunk before any gets a second.

    Args:
      peers: all peers.
      num_wanted: chunks to request at most; the run needs no more. May be negative.
    """
    training = [peer for peer in peers if peer.stage == "training"]
    training.sort(key=lambda peer: peer.last_requested)
    requests: list[PeerRecord] = []
    for _ in range(CHUNKS_AHEAD):
        for peer in training:
            if len(requests) >= num_wanted:
                return requests
            if peer.num_in_flight + requests.count(peer) < CHUNKS_AHEAD:
                requests.append(peer)
    return requests
