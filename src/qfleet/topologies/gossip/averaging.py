"""The arithmetic of gossip, on NumPy arrays. A list of arrays holds the leaves of a tree, in the tree's order."""

import numpy as np

Leaves = list[np.ndarray]


def average_step(params: Leaves, own: Leaves, other: Leaves) -> Leaves:
    """Returns parameters moved by half of the difference between two snapshots: towards the other peer's.

    Both peers of a pair take this step, each with the snapshots swapped. One gains exactly what the other gives, to the
    last bit. The sum over all peers therefore stays the same, except for the rounding of two additions, whatever either
    peer has learned since its snapshot. If neither has learned anything since, both arrive at the mean of the two.

    Args:
      params: the peer's parameters now.
      own: the peer's snapshot when the exchange was decided.
      other: the other peer's snapshot at the same time.

    Source: Lian et al. 2018, arXiv 1710.06952, algorithm 1, with stale snapshots on both sides instead of a lock.
    """
    return [x + (theirs - mine) / 2 for x, mine, theirs in zip(params, own, other, strict=True)]


def mean_of(states: list[Leaves], furthest: int = 0) -> Leaves:
    """Returns the mean of each leaf over the peers. A leaf that isn't floating-point, such as a counter, is copied.

    Args:
      states: leaves of each peer's state.
      furthest: index of the peer that has taken the most learner steps; leaves that can't be averaged are its own.
    """

    def mean(*leaves: np.ndarray) -> np.ndarray:
        dtype = leaves[furthest].dtype
        if not np.issubdtype(dtype, np.floating):
            return leaves[furthest]
        total = leaves[0].astype(np.float64)  # in float32 the sum would depend on the order of the peers
        for leaf in leaves[1:]:
            total = total + leaf
        return (total / len(leaves)).astype(dtype)

    return [mean(*leaves) for leaves in zip(*states, strict=True)]


def consensus_distance(params: list[Leaves]) -> float:
    """Returns how far apart the peers are: the root mean square of |x_i - mean|, divided by |mean|.

    Args:
      params: leaves of each peer's parameters.

    Source: Lian et al. 2018, arXiv 1710.06952, whose analysis bounds this distance. Ours is relative, so that the same
    number means the same for every network.
    """
    mean = mean_of(params)
    size = _squared_norm(mean)
    spread = sum(_squared_norm([x - m for x, m in zip(each, mean, strict=True)]) for each in params) / len(params)
    return float(np.sqrt(spread / size)) if size else 0.0


def split_evenly(total: int, num_peers: int) -> list[int]:
    """Returns a whole number split into one share for each peer. Shares differ by at most one, and add up to it."""
    return [total // num_peers + (i < total % num_peers) for i in range(num_peers)]


def _squared_norm(leaves: Leaves) -> float:
    return sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in leaves)
