"""Greedy evaluation: whole episodes, apart from training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.core import exploration
from qfleet.core.actor import init_view, push_frame
from qfleet.core.types import Params
from qfleet.envs.spec import InGraphEnv

MAX_EPISODE_STEPS = 27_000
"""Where an episode of an environment without a time limit is cut: half an hour of Atari at 60 frames/s."""


def greedy_returns(
    env: InGraphEnv, q_values: Callable[[Params, Array], Array], params: Params, key: Array, num_episodes: int
) -> Array:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32, all stepped at once.

    Args:
      q_values: `q_values(params, obs) -> q`, over a batch.
      key: of these episodes; never one that training has used.
    """
    limit = env.spec.time_limit or MAX_EPISODE_STEPS
    frame_stack = env.spec.frame_stack
    reset_key, step_key = jax.random.split(key)
    env_state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))
    nobody = jnp.zeros(num_episodes, bool)

    def step(carry: tuple) -> tuple:
        time, env_state, view, has_ended, returns = carry
        action = exploration.greedy(q_values(params, view))
        keys = jax.random.split(jax.random.fold_in(step_key, time), num_episodes)
        result = jax.vmap(env.step)(env_state, action, keys)
        returns += jnp.where(has_ended, 0.0, result.reward)
        has_ended |= result.terminated | result.truncated
        return time + 1, result.state, push_frame(view, result.observation, nobody, frame_stack), has_ended, returns

    def is_running(carry: tuple) -> Array:
        time, _, _, has_ended, _ = carry
        return (time < limit) & ~jnp.all(has_ended)

    start = (jnp.int32(0), env_state, init_view(obs, frame_stack), nobody, jnp.zeros(num_episodes))
    return jax.lax.while_loop(is_running, step, start)[-1]
