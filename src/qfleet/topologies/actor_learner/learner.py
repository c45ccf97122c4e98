"""The learner of the actor-learner topology: learns from batches that the shards of the replay have drawn."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from qfleet.config import TrainConfig
from qfleet.core.keys import Stream, key_of, key_shape
from qfleet.core.learner import LearnerState, init_from_seed, make_learner, update
from qfleet.core.replay import normalise_weights
from qfleet.core.types import EnvSpec, Transition, count_params
from qfleet.core.updates import Losses, add_losses, no_losses
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.runtime.devices import limit_cpu_threads, set_cpu_devices
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory
from qfleet.topologies.fleet.env_and_agent import make_env_and_agent
from qfleet.topologies.fleet.replay_shares import put_together
from qfleet.topologies.mesh import DATA_AXIS, REPLICATED, Placement, leaves_of

Leaves = list[np.ndarray]
"""A tree of arrays, in the order of `jax.tree.leaves`."""

ROUND_BYTES = 16_000_000
"""Approximate size of the observations of one round."""

MOST_BATCHES = 16
"""Largest number of batches in one round: enough to hide the cost of a message, few enough that priorities come back
soon."""


class UpdateResult(NamedTuple):
    """Result of the learner steps of one round."""

    loss: float
    """Sum over the learner steps of the round."""
    td_error: float
    """Sum over the learner steps of the round, of the mean absolute TD errors."""
    learner_steps: int
    """Learner steps in total, after the round."""
    busy_seconds: float
    """Time that the round took."""


class GlobalLearner:
    """Takes learner steps on batches of the global replay, which all actors fill."""

    def __init__(self, config: TrainConfig) -> None:
        """Makes a learner with the first parameters of the run's seed.

        Raises:
          ConfigError: if its mesh needs more devices than there are.
        """
        mesh = config.topology.mesh
        if mesh.num_devices > 1:
            set_cpu_devices(mesh.num_devices)
        env, network, agent = make_env_and_agent(config)
        limit_cpu_threads(count_params(jax.eval_shape(network.init, key_shape())))
        enable_compilation_cache()
        if jax.default_backend() == "cpu":
            reuse_freed_memory()
        self._config, self._num_batches = config.agent, batches_per_round(config, env.spec)
        self._placement = Placement(mesh, network)
        learner, replicas = make_learner(agent, config.agent), self._placement.replicas

        def init(seed: Array) -> LearnerState:
            return init_from_seed(learner, agent, seed)

        def learn(state: LearnerState, batches: Transition, first: Array) -> tuple[LearnerState, Losses, Array]:
            def step(carry: tuple[LearnerState, Losses], inputs: tuple[Transition, Array]) -> tuple:
                (state, losses), (batch, number) = carry, inputs
                batch = normalise_weights(batch, config.agent, replicas)
                key = key_of(np.uint32(config.seed), Stream.LEARNING, number)
                state, info = update(learner, state, batch, key, replicas)
                return (state, add_losses(losses, info)), info.priority

            numbers = first + jnp.arange(self._num_batches, dtype=jnp.uint32)
            carry: tuple[Any, Array] = jax.lax.scan(step, (state, no_losses()), (batches, numbers))
            (state, losses), priority = carry
            return state, replicas.mean(losses), priority

        specs = self._placement.partition_learner(jax.eval_shape(init, np.uint32(0)))
        batches = PartitionSpec(None, DATA_AXIS)
        self._round = self._placement.jit(
            learn, (specs, batches, REPLICATED), (specs, REPLICATED, batches), donate_argnums=(0,)
        )
        self._learner_state = self._placement.jit(init, (REPLICATED,), specs)(np.uint32(config.seed))
        self._learner_steps = 0

    def learn(self, places: list[np.ndarray], *shares: Transition) -> tuple[UpdateResult, list[np.ndarray]]:
        """Takes the learner steps of one round.

        Args:
          places: for each share of the round, the positions of its transitions in the round, `[num_draws]`. The
            positions of one batch follow those of the batch before.
          *shares: for each share, its transitions, `[num_draws, ...]`, NumPy arrays.

        Returns:
          The result, and for each share the priorities of its transitions, `[num_draws]`.
        """
        started = time.perf_counter()
        shape = (self._num_batches, self._config.batch_size)
        batches = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), put_together(places, shares))
        first = np.uint32(self._learner_steps % 2**32)
        self._learner_state, losses, priority = self._round(self._learner_state, batches, first)
        self._learner_steps += self._num_batches
        losses, priority = jax.device_get((losses, priority))
        flat = priority.reshape(-1)
        busy_seconds = time.perf_counter() - started
        result = UpdateResult(float(losses.loss), float(losses.td_error), self._learner_steps, busy_seconds)
        return result, [flat[place] for place in places]

    def publish(self) -> tuple[int, Leaves]:
        """Returns the learner steps taken so far, and the parameters, in the order of `jax.tree.leaves`."""
        return self._learner_steps, leaves_of(self._learner_state.params)

    def state(self) -> tuple[int, Leaves]:
        """Returns the learner steps taken so far, and the leaves of the learner's state, as `jax.tree.leaves` does."""
        return self._learner_steps, leaves_of(self._learner_state)

    def restore(self, learner_steps: int, leaves: Leaves) -> None:
        """Goes on from what `state` returned."""
        state = jax.tree.unflatten(jax.tree.structure(self._learner_state), leaves)
        self._learner_state = jax.tree.map(
            lambda x, old: jax.device_put(jnp.array(x), old.sharding), state, self._learner_state
        )
        self._learner_steps = learner_steps


def batches_per_round(config: TrainConfig, spec: EnvSpec) -> int:
    """Returns how many batches a round has: few if observations are large, many if they are small."""
    num_obs = config.agent.rows_after_start + 1 if config.agent.learns_sequences else 2
    obs_bytes = int(np.prod(spec.lane_shape)) * spec.frame_stack * spec.observation_dtype.itemsize
    return max(1, min(MOST_BATCHES, ROUND_BYTES // (num_obs * obs_bytes * config.agent.batch_size)))
