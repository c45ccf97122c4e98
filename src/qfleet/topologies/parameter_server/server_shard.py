"""One shard of the parameter server: it keeps a piece of the parameters, and applies gradients to it."""

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.sharded_learner import (
    ShardedLearner,
    StateLeaves,
    TargetUpdateTracker,
    mean_gradient,
)
from qfleet.core.types import Params
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory
from qfleet.topologies.fleet.env_and_agent import make_env_and_agent


class PublishedParameters(NamedTuple):
    """What a shard publishes after some learner steps."""

    busy_seconds: float
    """Time that the steps took."""
    params: np.ndarray
    """`[piece]` float32, valid until the next step."""
    target_params: np.ndarray | None
    """The same of the target network; None if the steps left it as it was."""


class SquaredNorms(NamedTuple):
    """The squared norms of a shard's pieces of some gradients."""

    busy_seconds: float
    """Time that it took to compute them."""
    values: list[float]
    """One for each learner step, of the mean of its gradients."""


class ShardState(NamedTuple):
    """A copy of all that a shard must keep."""

    busy_seconds: float
    """Time that it took to copy it."""
    leaves: StateLeaves


class ServerShard:
    """Applies gradients to its piece of the parameters, and publishes the result."""

    def __init__(self, config: TrainConfig, number: int) -> None:
        """Begins with the parameters that follow from the run's seed.

        Args:
          config: config of the run.
          number: number of the shard, from 0.
        """
        topology = config.topology_as(ParameterServerConfig)
        enable_compilation_cache()
        reuse_freed_memory()
        agent = make_env_and_agent(config).agent
        self._learner = learner = ShardedLearner(agent, config.agent, topology.num_server_shards)
        self._number, self._gradients_per_step = number, topology.gradients_per_learner_step
        self.gradient_dtype = jnp.dtype(topology.gradient_dtype)

        def step(state: LearnerState, gradients: tuple[Array, ...]) -> LearnerState:
            gradient = mean_gradient(gradients)
            return learner.apply(state, gradient, learner.squared_norm(gradient, number), number)

        def average(gradients: tuple[Array, ...]) -> tuple[Array, Array]:
            gradient = mean_gradient(gradients)
            return gradient, learner.squared_norm(gradient, number)

        # A state is donated: each step is taken in place, without a second copy of the parameters and moments.
        self._step = jax.jit(step, donate_argnums=0)
        self._average = jax.jit(average)
        self._apply = jax.jit(functools.partial(learner.apply, shard=number), donate_argnums=0)
        self._vector_of = jax.jit(learner.vector_of) if learner.keeps_tree else learner.vector_of
        self._init = jax.jit(functools.partial(learner.init_shard, shard=number))
        self._seed = np.uint32(config.seed)
        self._learner_state: LearnerState = self._init(self._seed)
        self._averages: tuple[Array, ...] = ()
        self._target_updates = TargetUpdateTracker(config.agent.target_update_period)

    # --- Learner steps ---

    def apply_gradients(self, gradients: Sequence[np.ndarray]) -> PublishedParameters:
        """Takes learner steps that need no other shard: the server has one shard, or gradients are not clipped.

        Args:
          gradients: `[piece]` each, all gradients of the first step, then all of the next.
        """
        started = time.perf_counter()
        for of_one_step in self._by_step(gradients):
            self._learner_state = self._step(self._learner_state, of_one_step)
        return self._publish_steps(started, len(gradients) // self._gradients_per_step)

    def average_gradients(self, gradients: Sequence[np.ndarray]) -> SquaredNorms:
        """Averages the gradients of each learner step, and keeps the means for `apply_averages`.

        Clipping by the norm of the whole gradient takes two calls, because the norm needs the squares of all shards:
        each shard reports those of its piece here, and learns those of the others in `apply_averages`.

        Args:
          gradients: as in `apply_gradients`.
        """
        started = time.perf_counter()
        self._averages, squares = zip(*map(self._average, self._by_step(gradients)), strict=True)
        values = [float(square) for square in squares]
        return SquaredNorms(time.perf_counter() - started, values)

    def apply_averages(self, squared_norms: Sequence[list[float]]) -> PublishedParameters:
        """Takes learner steps with the gradients that `average_gradients` kept, clipped by the norm of the whole.

        Args:
          squared_norms: for each shard of the server, the values of its `SquaredNorms`.
        """
        started = time.perf_counter()
        for average, squares in zip(self._averages, zip(*squared_norms, strict=True), strict=True):
            self._learner_state = self._apply(self._learner_state, average, np.float32(sum(squares)))
        return self._publish_steps(started, len(self._averages))

    def _by_step(self, gradients: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the gradients of each learner step."""
        arrays = iter(gradients)
        while of_one_step := tuple(itertools.islice(arrays, self._gradients_per_step)):
            yield of_one_step

    # --- Parameters ---

    def publish(self) -> PublishedParameters:
        """Publishes the parameters and those of the target network, as they are."""
        return PublishedParameters(
            0.0, self._as_vector(self._learner_state.params), self._as_vector(self._learner_state.target_params)
        )

    def _publish_steps(self, started: float, num_learner_steps: int) -> PublishedParameters:
        target = None
        if self._target_updates.advance(num_learner_steps):
            target = self._as_vector(self._learner_state.target_params)
        params = self._as_vector(self._learner_state.params)
        return PublishedParameters(time.perf_counter() - started, params, target)

    def _as_vector(self, params: Params) -> np.ndarray:
        return np.asarray(self._vector_of(params))

    # --- State ---

    def state(self) -> ShardState:
        """Returns a copy of all that the shard must keep."""
        started = time.perf_counter()
        leaves = [np.array(leaf) for leaf in jax.device_get(jax.tree.leaves(self._learner_state))]
        return ShardState(time.perf_counter() - started, leaves)

    def restore(self, leaves: StateLeaves) -> None:
        """Continues from the leaves of a `ShardState`."""
        self._replace_state(jax.tree.map(jnp.array, self._learner.shard_state(leaves, self._number)))

    def reset(self) -> None:
        """Begins again with the parameters that follow from the run's seed."""
        self._replace_state(self._init(self._seed))

    def _replace_state(self, state: LearnerState) -> None:
        self._learner_state, self._target_updates.age = state, int(state.target_age)
