"""Greedy evaluation: whole episodes, apart from training."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core import exploration
from qfleet.core.frame_stack import init_view, push_frame
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import EnvSpec, Params, identity
from qfleet.envs.host import HostLanes
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.activity import announce
from qfleet.runtime.host_acting import HostActing

logger = logging.getLogger("qfleet")

MAX_LOST = 3
"""Number of episodes that an evaluation may lose to failures, per episode that it asks for."""

MAX_EPISODE_STEPS = 27_000
"""Length at which an episode is cut if its environment has no time limit: half an hour of Atari at 60 frames/s."""


def greedy_returns(
    env: InGraphEnv,
    q_values: Callable[[Params, Array], Array],
    params: Params,
    key: Array,
    num_episodes: int,
    to_storage_layout: Callable[[Array], Array] = identity,
    replicas: Replicas = ALONE,
) -> Array:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32. All are stepped at once.

    Args:
      q_values: `q_values(params, obs) -> q`, for a batch of observations.
      key: random key of these episodes. Training must not have used it.
      num_episodes: number of episodes, over all replicas.
      to_storage_layout: converts observations to the layout that `q_values` takes; `Network.to_storage_layout`.
      replicas: the replicas among which the episodes are divided.
    """
    limit = env.spec.time_limit or MAX_EPISODE_STEPS
    frame_stack = env.spec.frame_stack
    num_own = -(-num_episodes // replicas.size)
    numbers = local_lane_ids(replicas, num_own)

    def keys_of(key: Array) -> Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    reset_key, step_key = jax.random.split(key)
    env_state, obs = jax.vmap(env.reset)(keys_of(reset_key))
    nobody = jnp.zeros(num_own, bool)

    def step(carry: tuple) -> tuple:
        time, env_state, view, has_ended, returns = carry
        action = exploration.greedy(q_values(params, view))
        result = jax.vmap(env.step)(env_state, action, keys_of(jax.random.fold_in(step_key, time)))
        returns += jnp.where(has_ended, 0.0, result.reward)
        has_ended |= result.terminated | result.truncated
        view = push_frame(view, to_storage_layout(result.observation), nobody, frame_stack)
        return time + 1, result.state, view, has_ended, returns

    def is_running(carry: tuple) -> Array:
        time, _, _, has_ended, _ = carry
        return (time < limit) & ~jnp.all(has_ended)

    start = (jnp.int32(0), env_state, init_view(to_storage_layout(obs), frame_stack), nobody, jnp.zeros(num_own))
    returns = jax.lax.while_loop(is_running, step, start)[-1]
    return replicas.gather(returns).reshape(-1)[:num_episodes]


def host_greedy_returns(
    lanes: HostLanes,
    spec: EnvSpec,
    act: Callable[[Array], Array],
    num_episodes: int,
    seed: int,
    to_storage_layout: Callable[[Array], Array] = identity,
) -> np.ndarray:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32.

    It counts the episodes that start first, leaving out those whose environment fails. Counting the episodes that end
    first would favour short ones. Replaying an episode that failed might never end, because the environment may always
    fail at the same place.

    If failures take more than `MAX_LOST` times as many episodes as are asked for, the evaluation logs a warning and
    returns the whole episodes that it has by then, which may be none: an environment that fails every 1,000 steps never
    completes an episode of 1,000 steps.

    Args:
      lanes: at least one lane; all are reset.
      spec: the spec of the lanes' environment.
      act: `act(view) -> action`, from `[lanes, ...]` stacks of stored frames to `[lanes]`.
      num_episodes: how many returns to collect, over all lanes.
      seed: seed of these episodes; it must differ from every seed of training.
      to_storage_layout: converts observations to what `act` expects, as `Network.to_storage_layout` does.
    """
    limit = spec.time_limit or MAX_EPISODE_STEPS
    push = jax.jit(lambda view, obs, is_first: push_frame(view, to_storage_layout(obs), is_first, spec.frame_stack))
    acting = HostActing(lanes, seed, max_episode_steps=limit)
    view = init_view(to_storage_layout(jnp.asarray(acting.obs)), spec.frame_stack)
    under_way = np.arange(len(view))  # the episode of each lane, numbered in the order in which they start
    returns: dict[int, float] = {}
    num_lost = 0
    while len(returns) < num_episodes or sorted(returns)[num_episodes - 1] > np.min(under_way):
        acting.send(np.asarray(act(view), np.int32))
        row = acting.receive()
        returns |= zip(under_way[row.episode_ended].tolist(), row.returns, strict=True)
        if np.any(row.episode_ended):
            announce(f"evaluating {min(len(returns), num_episodes)} of {num_episodes}")
        is_next = row.episode_ended | row.failed
        under_way[is_next] = np.max(under_way) + 1 + np.arange(np.sum(is_next))
        view = push(view, acting.obs, acting.is_first)
        num_lost += row.num_failures
        if num_lost > MAX_LOST * num_episodes:
            logger.warning(
                "an evaluation lost %d episodes to environments that failed, and was given up with %d whole ones of %d",
                num_lost,
                min(len(returns), num_episodes),
                num_episodes,
            )
            break
    return np.array([returns[number] for number in sorted(returns)[:num_episodes]], np.float32)
