"""A learner in pieces: its parameters as one vector, cut where several servers each keep a part of it.

Every optimiser that treats each parameter alike does to a piece what it does to that part of the whole. The others need
all of a network at once, and so one piece.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.learner import LearnerState
from qfleet.core.types import Params


def bounds(num_params: int, num_pieces: int) -> list[tuple[int, int]]:
    """Returns where each piece begins and ends, all as long as each other but for one parameter."""
    ends = [num_params * i // num_pieces for i in range(num_pieces + 1)]
    return list(itertools.pairwise(ends))


def num_params(params: Params) -> int:
    """Returns how many numbers a tree of arrays, or of their shapes, has."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def to_vector(tree: Params) -> Array:
    """Returns the tree's numbers as one vector, `[num_params]` float32, leaf after leaf."""
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def to_tree(vector: Array, like: Params) -> Params:
    """Returns the tree of which this is the vector; `like` has its shapes and types."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in leaves)])
    parts = [vector[a:b] for a, b in itertools.pairwise(ends)]
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def split(whole: LearnerState, piece_like: LearnerState, number: int, num_pieces: int) -> LearnerState:
    """Returns one piece of a learner.

    Args:
      whole: NumPy arrays.
      piece_like: shapes of that piece, whose parameters are a vector.
      number: of the piece, from 0.
      num_pieces: of the whole.
    """
    total = num_params(whole.params)
    start, end = bounds(total, num_pieces)[number]
    leaves = iter(jax.tree.leaves(whole))

    def next_part(like: Any) -> np.ndarray:
        if like.shape != (end - start,):
            return np.asarray(next(leaves))
        vector, size = [], 0
        while size < total:
            leaf = np.ravel(next(leaves))
            vector.append(leaf)
            size += len(leaf)
        return np.concatenate(vector)[start:end]

    return jax.tree.map(next_part, piece_like)


def join(pieces: list[LearnerState], like: LearnerState) -> LearnerState:
    """Returns the learner of which these are the pieces, in order.

    Args:
      pieces: NumPy arrays; parameters are vectors.
      like: shapes of the whole.
    """
    columns = [jax.tree.leaves(piece) for piece in pieces]
    sizes = [len(piece.params) for piece in pieces]
    leaves: list[np.ndarray] = []
    shapes = iter(jax.tree.leaves(like))
    for parts in zip(*columns, strict=True):
        if [part.shape for part in parts] != [(size,) for size in sizes]:
            next(shapes)
            leaves.append(parts[0])
            continue
        vector, used = np.concatenate(parts), 0
        while used < len(vector):
            shape = next(shapes)
            size = int(np.prod(shape.shape))
            leaves.append(vector[used : used + size].reshape(shape.shape).astype(shape.dtype))
            used += size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
