"""Replicas of one learner, in step: each has its share of the lanes, the replay and every batch.

Everything that they tell each other goes through these functions, so that the rest of the core reads as for one
learner, and is compiled as for one where there is only one. With the same seed, replicas do together what one would
do alone, up to rounding: whatever is drawn at random is drawn by its number in the whole, not in a share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree


class Replicas(NamedTuple):
    """How many there are, and how they agree. The functions are for use inside the program that all of them run."""

    size: int
    rank: Callable[[], Array]
    """`rank() -> []` uint32, which of them this is."""
    mean: Callable[[Any], Any]
    """`mean(tree) -> tree`, the same for all."""
    sum: Callable[[Any], Any]
    """`sum(tree) -> tree`, the same for all."""
    gather: Callable[[Array], Array]
    """`gather(x) -> [replicas, ...]`, everybody's `x`, the same for all."""
    deal: Callable[[Any, Array], Any]
    """`deal(tree, is_mine) -> tree`: from `[batch, ...]`, of which each replica holds those that `is_mine`, `[batch]`
    bool, and one of them each, to an equal share of it for each, `[batch / replicas, ...]`, in order."""


ALONE = Replicas(
    size=1,
    rank=lambda: jnp.uint32(0),
    mean=lambda tree: tree,
    sum=lambda tree: tree,
    gather=lambda x: x[None],
    deal=lambda tree, is_mine: tree,
)
"""One learner."""


def over_axis(name: str, size: int, *, as_vector: bool = False) -> Replicas:
    """Returns the replicas along a mesh axis of `size` devices, for use under `jax.shard_map` over it.

    Args:
      name: of the axis.
      size: of it.
      as_vector: means of many arrays are taken of one vector. Between processes on CPUs each array is a message of
        its own, at a quarter of a millisecond; but arrays that are divided over another axis must stay apart.
    """
    if size == 1:
        return ALONE

    def mean(tree: Any) -> Any:
        if not as_vector:
            return jax.lax.pmean(tree, name)
        vector, unravel = ravel_pytree(tree)
        return unravel(jax.lax.pmean(vector, name))

    def deal(tree: Any, is_mine: Array) -> Any:
        words, unpack = _as_words(tree)  # one message, and numbers that only one replica knows: they add up exactly
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
    """Returns which of all lanes (or episodes) are the `count` that are this replica's: `[count]` uint32."""
    return replicas.rank() * jnp.uint32(count) + jnp.arange(count, dtype=jnp.uint32)


def _as_words(tree: Any) -> tuple[Array, Callable[[Array], Any]]:
    """Returns a tree of `[batch, ...]` as `[batch, words]` uint32, bit for bit, and the way back for any batch."""
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
