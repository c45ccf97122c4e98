"""Replicas: copies of one learner that run in step. Each has a share of the lanes, the replay and every batch.

The replicas exchange data only through these functions. So the rest of the core is written for one learner, and it is
compiled for one learner if there is only one. With the same seed, replicas do together what one learner does alone, up
to rounding, because each random number is drawn by its index in the whole, not in a replica's share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree


class Replicas(NamedTuple):
    """The number of replicas, and the functions by which they agree. All replicas call them, inside their program."""

    size: int
    rank: Callable[[], Array]
    """`rank() -> []` uint32, the number of this replica, from 0."""
    mean: Callable[[Any], Any]
    """`mean(tree) -> tree`, the mean over the replicas, the same for all of them."""
    sum: Callable[[Any], Any]
    """`sum(tree) -> tree`, the sum over the replicas, the same for all of them."""
    gather: Callable[[Array], Array]
    """`gather(x) -> [replicas, ...]`, the `x` of every replica, the same for all of them."""
    deal: Callable[[Any, Array], Any]
    """`deal(tree, is_mine) -> tree` gives each replica an equal share of a batch, in order: from `[batch, ...]` to
    `[batch / replicas, ...]`. Before, each element is held by exactly one replica, whose `is_mine`, `[batch]` bool, is
    True there."""


ALONE = Replicas(
    size=1,
    rank=lambda: jnp.uint32(0),
    mean=lambda tree: tree,
    sum=lambda tree: tree,
    gather=lambda x: x[None],
    deal=lambda tree, is_mine: tree,
)
"""A single learner."""


def over_axis(name: str, size: int, *, as_vector: bool = False) -> Replicas:
    """Returns the replicas along a mesh axis of `size` devices, for use under `jax.shard_map` over that axis.

    Args:
      name: the axis.
      size: the number of devices along the axis.
      as_vector: whether `mean` joins all arrays into one vector first. Between processes on CPUs each array is a
        message of its own, which takes a quarter of a millisecond. But arrays that are divided over another axis can't
        be joined.
    """
    if size == 1:
        return ALONE

    def mean(tree: Any) -> Any:
        if not as_vector:
            return jax.lax.pmean(tree, name)
        vector, unravel = ravel_pytree(tree)
        return unravel(jax.lax.pmean(vector, name))

    def deal(tree: Any, is_mine: Array) -> Any:
        # As words, the whole tree is one message. The sum is exact, because all replicas but one contribute 0.
        words, unpack = _as_words(tree)
        return unpack(jax.lax.psum_scatter(jnp.where(is_mine[:, None], words, 0), name, tiled=True))

    return Replicas(
        size=size,
        rank=lambda: jax.lax.axis_index(name).astype(jnp.uint32),
        mean=mean,
        sum=lambda tree: jax.lax.psum(tree, name),
        gather=lambda x: jax.lax.all_gather(x, name),
        deal=deal,
    )


def local_lane_ids(replicas: Replicas, count: int) -> Array:
    """Returns the numbers, among all lanes (or episodes), of this replica's `count` ones: `[count]` uint32."""
    return replicas.rank() * jnp.uint32(count) + jnp.arange(count, dtype=jnp.uint32)


def _as_words(tree: Any) -> tuple[Array, Callable[[Array], Any]]:
    """Returns the bits of a tree of `[batch, ...]` as `[batch, words]` uint32, and the inverse, for any batch size."""
    leaves, structure = jax.tree.flatten(tree)

    def as_bytes(x: Array) -> Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)

    columns = [as_bytes(leaf) for leaf in leaves]
    ends = np.cumsum([column.shape[1] for column in columns])
    padding = jnp.zeros((len(columns[0]), -ends[-1] % 4), jnp.uint8)
    together = jnp.concatenate([*columns, padding], axis=1)
    words = jax.lax.bitcast_convert_type(together.reshape(len(together), -1, 4), jnp.uint32)

    def unpack(words: Array) -> Any:
        together = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), -1)

        def unpacked(column: Array, leaf: Array) -> Array:
            if leaf.dtype == jnp.bool_:
                return column.reshape(-1, *leaf.shape[1:]).astype(bool)
            size = leaf.dtype.itemsize
            shape = (-1, *leaf.shape[1:]) if size == 1 else (-1, *leaf.shape[1:], size)
            return jax.lax.bitcast_convert_type(column.reshape(shape), leaf.dtype)

        parts = jnp.split(together[:, : ends[-1]], ends[:-1], axis=1)
        return jax.tree.unflatten(structure, [unpacked(*each) for each in zip(parts, leaves, strict=True)])

    return words, unpack
