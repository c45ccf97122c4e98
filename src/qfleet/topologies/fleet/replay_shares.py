"""How a replay is shared out over its shards: which shard draws how much, and which lanes each shard keeps."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from qfleet.config import ActorPool
from qfleet.core.replay import SavedReplay
from qfleet.core.types import Transition

_HEADS = ("cursor", "size", "insertions")
"""Fields of a ring that hold one number for each segment."""


def deal(size: int, priorities: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many of `size` draws go to each shard, `[shards]`, and each shard's share of the whole.

    A shard gets the number that its share of the priorities implies, rounded up or down at random. On average it gets
    exactly that number.
    """
    shares = priorities / priorities.sum()
    ends = np.floor(np.cumsum(shares) * size + random.random()).astype(np.int64)
    ends[-1] = size
    return np.diff(np.minimum(ends, size), prepend=0), shares


def put_together(places: list[np.ndarray], shares: tuple[Transition, ...]) -> Transition:
    """Joins the shares of a draw, and puts each transition in its place. Shards without draws have no share.

    Args:
      places: for each share, the positions of its transitions in the result, `[num_draws]`.
      shares: for each share, its transitions, `[num_draws, ...]`, NumPy arrays.
    """
    size = sum(map(len, places))

    def join(*columns: np.ndarray) -> np.ndarray:
        joined = np.empty((size, *columns[0].shape[1:]), columns[0].dtype)
        for place, column in zip(places, columns, strict=True):
            joined[place] = column
        return joined

    together: Transition = jax.tree.map(join, *shares)
    return together


def join_shards(parts: Iterable[SavedReplay], pool: ActorPool) -> SavedReplay:
    """Joins what the shards keep into one replay, with lanes and segments in the order of their actors.

    Each part is copied before the next one is asked for, because a part may be large. The arrays are read-only.
    """
    whole: Any = None
    greatest = []
    for number, part in enumerate(parts):
        whole = whole or _empty_whole(part, pool)
        _copy_share(whole, part, pool, number)
        greatest.append(part.max_priority)
    jax.tree.map(lambda x: x.setflags(write=False), (whole.ring, whole.leaves))
    joined: SavedReplay = whole._replace(max_priority=max(greatest, key=float))
    return joined


def _empty_whole(part: SavedReplay, pool: ActorPool) -> SavedReplay:
    def lanes(x: Any) -> Any:
        return np.empty((len(x), pool.num_lanes, *x.shape[2:]), x.dtype)

    heads: Any = {name: np.empty(pool.num_actors, getattr(part.ring, name).dtype) for name in _HEADS}
    ring = part.ring._replace(rows=jax.tree.map(lanes, part.ring.rows), **heads)
    return part._replace(ring=ring, leaves=jax.tree.map(lanes, part.leaves))


def _copy_share(whole: Any, part: SavedReplay, pool: ActorPool, number: int) -> None:
    actors = pool.actors_of(number)
    lanes = _lanes_of(actors, pool)
    for to, own in zip(
        jax.tree.leaves((whole.ring.rows, whole.leaves)), jax.tree.leaves((part.ring.rows, part.leaves)), strict=True
    ):
        to[:, lanes] = own
    for name in _HEADS:
        getattr(whole.ring, name)[actors] = getattr(part.ring, name)


def share_of(saved: SavedReplay, pool: ActorPool, number: int) -> SavedReplay:
    """Returns the share of the whole replay that shard `number` keeps."""
    actors = pool.actors_of(number)
    lanes = _lanes_of(actors, pool)
    heads: Any = {name: np.asarray(getattr(saved.ring, name))[actors] for name in _HEADS}
    rows, own = jax.tree.map(lambda x: np.asarray(x)[:, lanes], (saved.ring.rows, saved.leaves))
    return SavedReplay(saved.ring._replace(rows=rows, **heads), own, saved.max_priority)


def _lanes_of(actors: list[int], pool: ActorPool) -> np.ndarray:
    each = pool.lanes_per_actor
    return np.concatenate([actor * each + np.arange(each) for actor in actors])
