"""What peers that gossip have in common, as functions of NumPy arrays: lists of them are the leaves of trees."""

import numpy as np

Leaves = list[np.ndarray]


def mixed(params: Leaves, own: Leaves, other: Leaves) -> Leaves:
    """Returns parameters moved by half of the way that one's own snapshot had to another's.

    Both of a pair do so, each with its own snapshot first: what one gains, the other gives, to the last bit, and so the
    sum over all peers stays what it was but for the rounding of two additions, however much either has learned since.
    Where neither has, both come to the mean of the two.

    Args:
      params: what the peer has now.
      own: what it had when they met.
      other: what the other had then.

    Source: Lian et al. 2018, arXiv 1710.06952, algorithm 1, with stale snapshots on both sides instead of a lock.
    """
    return [x + (theirs - mine) / 2 for x, mine, theirs in zip(params, own, other, strict=True)]


def mean_of(states: list[Leaves], furthest: int = 0) -> Leaves:
    """Returns the mean of each leaf over some states; what isn't a float, such as a counter, is the furthest's.

    Args:
      states: of the peers.
      furthest: which of them has taken the most learner steps.
    """

    def mean(*leaves: np.ndarray) -> np.ndarray:
        dtype = leaves[furthest].dtype
        if not np.issubdtype(dtype, np.floating):
            return leaves[furthest]
        total = leaves[0].astype(np.float64)  # or the order of the sum would show
        for leaf in leaves[1:]:
            total = total + leaf
        return (total / len(leaves)).astype(dtype)

    return [mean(*leaves) for leaves in zip(*states, strict=True)]


def consensus_distance(params: list[Leaves]) -> float:
    """Returns how far apart the peers are: the root mean square of |x_i - mean|, as a share of |mean|.

    Args:
      params: of each peer.

    Source: Lian et al. 2018, arXiv 1710.06952, whose analysis bounds it; relative, for it to mean the same everywhere.
    """
    mean = mean_of(params)
    size = _squared_norm(mean)
    spread = sum(_squared_norm([x - m for x, m in zip(each, mean, strict=True)]) for each in params) / len(params)
    return float(np.sqrt(spread / size)) if size else 0.0


def shares_of(total: int, num_peers: int) -> list[int]:
    """Returns a whole number divided over the peers as evenly as may be."""
    return [total // num_peers + (i < total % num_peers) for i in range(num_peers)]


def _squared_norm(leaves: Leaves) -> float:
    return sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in leaves)
