"""Replicas of one learner, in step: each has its share of the lanes, the replay and every batch.

Everything that they tell each other goes through these functions, so that the rest of the core reads as for one
learner, and is compiled as for one where there is only one. With the same seed, replicas do together what one would
do alone, up to rounding: whatever is drawn at random is drawn by its number in the whole, not in a share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


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


def over_axis(name: str, size: int) -> Replicas:
    """Returns the replicas along a mesh axis of `size` devices, for use under `jax.shard_map` over it."""
    if size == 1:
        return ALONE

    def deal(tree: Any, is_mine: Array) -> Any:
        def masked(x: Array) -> Array:
            return jnp.where(is_mine.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

        return jax.lax.psum_scatter(jax.tree.map(masked, tree), name, tiled=True)

    return Replicas(
        size=size,
        rank=lambda: jax.lax.axis_index(name).astype(jnp.uint32),
        mean=lambda tree: jax.lax.pmean(tree, name),
        sum=lambda tree: jax.lax.psum(tree, name),
        gather=lambda x: jax.lax.all_gather(x, name),
        deal=deal,
    )


def own_numbers(replicas: Replicas, count: int) -> Array:
    """Returns which of all lanes (or episodes) are the `count` that are this replica's: `[count]` uint32."""
    return replicas.rank() * jnp.uint32(count) + jnp.arange(count, dtype=jnp.uint32)
