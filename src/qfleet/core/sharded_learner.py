"""One learner, divided over the shards of a parameter server.

The parameters are seen as one vector. Each shard keeps a piece of it, together with the optimiser's state for that
piece. An optimiser that treats every parameter alike changes a piece exactly as it would change this part of the whole
vector. Any other optimiser must see the whole network, so it needs a server with a single shard.

The functions here are pure. A worker computes `ShardedLearner.gradients`, each shard computes `mean_gradient` and
`ShardedLearner.apply`, and whoever writes or reads a checkpoint uses `join` and `split`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.agent import Agent
from qfleet.core.learner import ELEMENTWISE, LearnerState, UpdateInfo, draws_of_step, init_from_seed, make_learner
from qfleet.core.normalisation import NOWHERE, StatisticsPlace
from qfleet.core.types import Batch, Params, count_params

StateLeaves = list[np.ndarray]
"""A `LearnerState` as NumPy arrays, in the order of `jax.tree.leaves`."""


class ShardedLearner:
    """The functions of one learner whose parameters are divided over `num_shards` shards."""

    def __init__(self, agent: Agent, config: AgentConfig, num_shards: int) -> None:
        """Divides the learner of `agent`.

        Raises:
          ConfigError: if there are several shards, but the optimiser must see the whole network at once.
        """
        self.keeps_tree = config.optimiser not in ELEMENTWISE
        """Whether the only shard keeps the parameters as a tree, and not as a vector."""
        if num_shards > 1 and self.keeps_tree:
            raise ConfigError(
                f"num_server_shards must be 1 with an optimiser that looks at more than one parameter at once, got "
                f"num_server_shards={num_shards} and optimiser={config.optimiser}; choose one of "
                f"{', '.join(ELEMENTWISE)}"
            )
        self._agent, self.num_shards = agent, num_shards
        self._max_gradient_norm = config.max_gradient_norm
        # `apply` clips by the norm of the whole gradient, which the optimiser of one piece could not know.
        config = dataclasses.replace(config, max_gradient_norm=None)
        self.learner = make_learner(agent, config)
        self.shapes: LearnerState = jax.eval_shape(self.init, np.uint32(0))
        """Shapes of the whole learner."""
        self.num_params = count_params(self.shapes.params)
        num_statistics = 0 if agent.statistics is None else count_params(agent.statistics.take(self.shapes.params))
        self._num_learned = self.num_params - num_statistics  # statistics are last in the vector
        self.piece_bounds = piece_bounds(self.num_params, num_shards, num_statistics)
        """Start and end of each shard's piece in the vector of parameters. All statistics are in the last one."""
        self._learners = [self.learner] * num_shards
        """Each shard's learner, for its piece."""
        if not self.keeps_tree and agent.statistics is not None:
            place = _statistics_of_piece(agent.statistics.take(self.shapes.params), num_statistics)
            self._learners = [make_learner(agent, config, None, NOWHERE)] * (num_shards - 1)
            self._learners.append(make_learner(agent, config, None, place))

    # --- The initial state ---

    def init(self, seed: Array) -> LearnerState:
        """Returns the whole learner that a run with this seed, `[]` uint32, begins with, in any topology."""
        return init_from_seed(self.learner, self._agent, seed)

    def init_shard(self, seed: Array, shard: int) -> LearnerState:
        """Returns the initial state of one shard.

        Its parameters are its piece of the vector, or the whole tree if the optimiser must see the whole network.
        """
        whole = self.init(seed)
        if self.keeps_tree:
            return whole
        start, end = self.piece_bounds[shard]
        return self._learners[shard].init(to_vector(whole.params)[start:end])

    # --- One learner step ---

    def gradients(
        self, params: Params, target_params: Params, batch: Batch, key: Array, dtype: Any
    ) -> tuple[list[Array], UpdateInfo]:
        """Returns each shard's piece of the gradient of a batch, `[piece]` of type `dtype`, and the update's losses."""
        state = LearnerState(params, target_params, (), jnp.int32(0))
        gradient, info = self.learner.gradients(state, batch, draws_of_step(self.learner, key, len(batch.action)))
        vector = to_vector(gradient).astype(dtype)
        return [vector[start:end] for start, end in self.piece_bounds], info

    def squared_norm(self, piece: Array, shard: int) -> Array:
        """Returns the sum of the squares of a shard's piece of a gradient, `[]` float32. Statistics don't count."""
        return squared_norm(piece[: self._num_learned_of(shard)])

    def _num_learned_of(self, shard: int) -> int:
        """Returns how many numbers of a shard's piece are learned. Those that follow are statistics."""
        start, end = self.piece_bounds[shard]
        return min(end, self._num_learned) - start

    def apply(self, state: LearnerState, piece: Array, squared_norm: Array, shard: int) -> LearnerState:
        """Returns the state of a shard after one learner step.

        Args:
          state: of the shard.
          piece: `[piece]` float32, the shard's piece of the gradient.
          squared_norm: `[]` float32, squared norm of the whole gradient, over all shards. The gradient is clipped by
            it, as `optax.clip_by_global_norm` would clip the whole gradient.
          shard: number of the shard.
        """
        if self._max_gradient_norm is not None:
            norm, (learned, rest) = jnp.sqrt(squared_norm), jnp.split(piece, [self._num_learned_of(shard)])
            learned = jnp.where(norm < self._max_gradient_norm, learned, learned / norm * self._max_gradient_norm)
            piece = jnp.concatenate([learned, rest]) if rest.size else learned
        return self._learners[shard].apply(state, to_tree(piece, state.params) if self.keeps_tree else piece)

    def assemble_params(self, pieces: Sequence[np.ndarray]) -> Params:
        """Returns the parameters, as a tree, from the pieces of all shards, `[piece]` float32 each."""
        leaves, structure = jax.tree.flatten(self.shapes.params)
        ends = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in leaves)])

        def numbers(start: int, end: int) -> Array:
            parts = [
                piece[max(start, first) - first : min(end, last) - first]
                for piece, (first, last) in zip(pieces, self.piece_bounds, strict=True)
                if first < end and start < last
            ]  # mostly one, so that the vector need not be put together first
            return jnp.asarray(parts[0]) if len(parts) == 1 else jnp.concatenate(parts)

        assembled = [
            numbers(start, end).reshape(leaf.shape).astype(leaf.dtype)
            for leaf, (start, end) in zip(leaves, itertools.pairwise(ends), strict=True)
        ]
        return jax.tree.unflatten(structure, assembled)

    def vector_of(self, params: Params) -> Array:
        """Returns a shard's piece of the vector, `[piece]` float32, from the parameters of its state."""
        return to_vector(params) if self.keeps_tree else params

    # --- The whole state and the states of its shards ---

    def split(self, whole: LearnerState) -> list[StateLeaves]:
        """Returns the state of each shard, as leaves, from the state of the whole learner in NumPy arrays."""
        if self.keeps_tree:
            return [[np.asarray(leaf) for leaf in jax.tree.leaves(whole)]]
        return [
            jax.tree.leaves(_cut_piece(whole, like, bounds, self.num_params))
            for like, bounds in zip(self._shard_shapes, self.piece_bounds, strict=True)
        ]

    def join(self, leaves: list[StateLeaves]) -> LearnerState:
        """Returns the state of the whole learner from the leaves of all shards: the inverse of `split`."""
        states = [self.shard_state(own, shard) for shard, own in enumerate(leaves)]
        return states[0] if self.keeps_tree else _join_pieces(states, self.shapes)

    def shard_state(self, leaves: StateLeaves, shard: int) -> LearnerState:
        """Returns one shard's state from its leaves."""
        state: LearnerState = jax.tree.unflatten(jax.tree.structure(self._shard_shapes[shard]), leaves)
        return state

    @functools.cached_property
    def _shard_shapes(self) -> list[LearnerState]:
        shards = range(self.num_shards)
        return [jax.eval_shape(functools.partial(self.init_shard, shard=i), np.uint32(0)) for i in shards]


class TargetUpdateTracker:
    """Tracks when `Learner.apply` updates the target network, which its caller cannot see."""

    def __init__(self, period: int) -> None:
        """Begins with a target network that has just been updated; `period` is in learner steps."""
        self._period = period
        self.age = 0
        """Learner steps since the last update. Set it when the learner's state is replaced by another."""

    def advance(self, num_learner_steps: int = 1) -> bool:
        """Counts learner steps, and returns whether at least one of them updates the target network."""
        num_updates, self.age = divmod(self.age + num_learner_steps, self._period)
        return num_updates > 0


def piece_bounds(num_params: int, num_pieces: int, num_statistics: int = 0) -> list[tuple[int, int]]:
    """Returns the start and end of each piece. The lengths of two pieces differ by one parameter at most.

    The last `num_statistics` numbers of the vector belong together, so the last piece may be longer to hold them.
    """
    ends = [min(num_params * i // num_pieces, num_params - num_statistics) for i in range(num_pieces)]
    return list(itertools.pairwise([*ends, num_params]))


def _statistics_of_piece(like: Params, count: int) -> StatisticsPlace:
    """Returns the place of statistics, whose shapes are those of `like`, at the end of a vector."""
    return StatisticsPlace(
        take=lambda piece: to_tree(piece[-count:], like),
        replace=lambda piece, value: jnp.concatenate([piece[:-count], to_vector(value)]),
    )


def to_vector(tree: Params) -> Array:
    """Returns the tree's numbers as one vector, `[num_params]` float32, leaf after leaf."""
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def to_tree(vector: Array, like: Params) -> Params:
    """Returns the tree whose numbers are `vector`: the inverse of `to_vector`. `like` has its shapes and types."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in leaves)])
    parts = [vector[a:b] for a, b in itertools.pairwise(ends)]
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def mean_gradient(gradients: Sequence[Array]) -> Array:
    """Returns the mean, `[piece]` float32, of the gradients of one learner step, `[piece]` each."""
    return jnp.mean(jnp.stack([gradient.astype(jnp.float32) for gradient in gradients]), axis=0)


def squared_norm(gradient: Array) -> Array:
    """Returns the sum of the squares of a gradient, or of a piece of one, `[]` float32."""
    return jnp.sum(jnp.square(gradient))


def _cut_piece(whole: LearnerState, like: LearnerState, bounds: tuple[int, int], num_params: int) -> LearnerState:
    """Returns one shard's piece of a learner.

    Both states are read leaf by leaf, in the same order. Where the piece has a vector of its length, the whole has the
    leaves of one tree of parameters (the parameters themselves, or the optimiser's moments of them), which are joined
    to a vector and cut. All other leaves, such as counts, are the same in every shard.

    Args:
      whole: the whole learner, in NumPy arrays.
      like: the shapes of the piece. Its parameters are a vector.
      bounds: start and end of the piece.
      num_params: parameters of the whole.
    """
    start, end = bounds
    leaves = iter(jax.tree.leaves(whole))

    def next_leaf(piece_leaf: Any) -> np.ndarray:
        if piece_leaf.shape != (end - start,):
            return np.asarray(next(leaves))
        parts, size = [], 0
        while size < num_params:
            parts.append(np.ravel(next(leaves)))
            size += len(parts[-1])
        return np.concatenate(parts)[start:end]

    return jax.tree.map(next_leaf, like)


def _join_pieces(pieces: list[LearnerState], like: LearnerState) -> LearnerState:
    """Returns the learner whose pieces these are, in order: the inverse of `_cut_piece`.

    Args:
      pieces: states of all shards, in NumPy arrays. Their parameters are vectors.
      like: the shapes of the whole learner.
    """
    columns = [jax.tree.leaves(piece) for piece in pieces]
    vector_shapes = [(len(piece.params),) for piece in pieces]
    leaves: list[np.ndarray] = []
    shapes = iter(jax.tree.leaves(like))
    for parts in zip(*columns, strict=True):
        if [part.shape for part in parts] != vector_shapes:
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
