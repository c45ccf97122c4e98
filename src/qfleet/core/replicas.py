"""Replicas: copies of one learner that run in step. Each has a share of the lanes, the replay and every batch.

The replicas exchange data only through these functions. So the rest of the core is written for one learner, and it is
compiled for one learner if there is only one. With the same seed, replicas do together what one learner does alone, up
to rounding, because each random number is drawn by its index in the whole, not in a replica's share.
"""

import functools
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
    """`sum(tree) -> tree`, the sum over the replicas, the same for all of them. The arrays must have the same dtype."""
    gather: Callable[[Array], Array]
    """`gather(x) -> [replicas, ...]`, the `x` of every replica, the same for all of them."""
    mean_and_gather: Callable[[Any, Any], tuple[Any, Any]]
    """`mean_and_gather(tree, shares) -> tree, whole` is `mean` of a tree of float32, and `gather` of each array of
    another, `[batch / replicas, ...]` float32, as `[batch, ...]`. Between processes on CPUs this is one message."""
    deal: Callable[[Any, Array, Any], tuple[Any, Any]]
    """`deal(tree, is_mine, known) -> tree, known` gives each replica an equal share of a batch, in order: from
    `[batch, ...]` to `[batch / replicas, ...]`. Before, each element is held by exactly one replica, whose `is_mine`,
    `[batch]` bool, is True there. `known`, `[batch, ...]`, is held in the same way, and all replicas get all of it."""


ALONE = Replicas(
    size=1,
    rank=lambda: jnp.uint32(0),
    mean=lambda tree: tree,
    sum=lambda tree: tree,
    gather=lambda x: x[None],
    mean_and_gather=lambda tree, shares: (tree, shares),
    deal=lambda tree, is_mine, known: (tree, known),
)
"""A single learner."""


def over_axis(name: str, size: int, *, has_slow_messages: bool = False, max_gather_bytes: int = 0) -> Replicas:
    """Returns the replicas along a mesh axis of `size` devices, for use under `jax.shard_map` over that axis.

    Args:
      name: the axis.
      size: the number of devices along the axis.
      has_slow_messages: whether all arrays of an exchange are joined into one vector first, as is best on CPUs. Between
        processes there each array would be a message of its own, and a message takes longer than what it carries. But
        arrays that are divided over another axis can't be joined.
      max_gather_bytes: size, over all replicas, up to which a joined vector is summed by an all-gather, after which
        each replica adds up by itself. With more than two replicas this sends more bytes than an all-reduce.
    """
    if size == 1:
        return ALONE
    functions = _in_few_messages(name, size, max_gather_bytes) if has_slow_messages else _array_by_array(name)
    return Replicas(
        size=size,
        rank=lambda: jax.lax.axis_index(name).astype(jnp.uint32),
        gather=lambda x: jax.lax.all_gather(x, name),
        **functions,
    )


def _array_by_array(name: str) -> dict[str, Callable]:
    """Returns the functions of replicas whose devices are connected so well that messages cost nothing."""

    def mean_and_gather(tree: Any, shares: Any) -> tuple[Any, Any]:
        return jax.lax.pmean(tree, name), jax.tree.map(lambda x: jax.lax.all_gather(x, name, tiled=True), shares)

    def deal(tree: Any, is_mine: Array, known: Any) -> tuple[Any, Any]:
        # As words, the whole tree is one message. The sum is exact, because all replicas but one contribute 0.
        words, unpack = _as_words(tree)
        share = unpack(jax.lax.psum_scatter(_only(is_mine, words), name, tiled=True))
        return share, jax.lax.psum(jax.tree.map(functools.partial(_only, is_mine), known), name)

    return {
        "mean": lambda tree: jax.lax.pmean(tree, name),
        "sum": lambda tree: jax.lax.psum(tree, name),
        "mean_and_gather": mean_and_gather,
        "deal": deal,
    }


def _in_few_messages(name: str, size: int, max_gather_bytes: int) -> dict[str, Callable]:
    """Returns the functions of replicas on CPUs, each of which sums a single vector."""

    def add_up(x: Array) -> Array:
        if size * x.nbytes > max_gather_bytes:
            return jax.lax.psum(x, name)
        return jnp.sum(jax.lax.all_gather(x, name), axis=0, dtype=x.dtype)

    def total(tree: Any) -> Any:
        vector, unravel = ravel_pytree(tree)
        return unravel(add_up(vector)) if vector.size else tree

    def mean(tree: Any) -> Any:
        return jax.tree.map(lambda x: x / size, total(tree))

    def mean_and_gather(tree: Any, shares: Any) -> tuple[Any, Any]:
        rank = jax.lax.axis_index(name)

        def in_place(share: Array) -> Array:
            whole = jnp.zeros((size * len(share), *share.shape[1:]), share.dtype)
            return jax.lax.dynamic_update_slice_in_dim(whole, share, rank * len(share), axis=0)

        summed, whole = total((tree, jax.tree.map(in_place, shares)))
        return jax.tree.map(lambda x: x / size, summed), whole

    def deal(tree: Any, is_mine: Array, known: Any) -> tuple[Any, Any]:
        # `psum_scatter` would send half as much. But between processes on CPUs it is reported to return wrong numbers
        # for shares of megabytes, in a development version of JAX 0.12, and to fail if a process comes 30 s late.
        words, unpack = _as_words((tree, known))
        share, known = unpack(add_up(_only(is_mine, words)))
        num_own = len(is_mine) // size
        first = jax.lax.axis_index(name) * num_own
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, num_own), share), known

    return {"mean": mean, "sum": total, "mean_and_gather": mean_and_gather, "deal": deal}


def _only(is_mine: Array, x: Array) -> Array:
    """Returns `x`, `[batch, ...]`, with zeros where another replica holds the element."""
    return jnp.where(is_mine.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


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
