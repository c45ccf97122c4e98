"""Greedy evaluation: whole episodes, apart from training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core import exploration
from qfleet.core.actor import init_view, push_frame
from qfleet.core.types import EnvSpec, Params, as_it_comes
from qfleet.envs.host import HostLanes
from qfleet.envs.spec import InGraphEnv

MAX_EPISODE_STEPS = 27_000
"""Where an episode of an environment without a time limit is cut: half an hour of Atari at 60 frames/s."""


def greedy_returns(
    env: InGraphEnv,
    q_values: Callable[[Params, Array], Array],
    params: Params,
    key: Array,
    num_episodes: int,
    store: Callable[[Array], Array] = as_it_comes,
) -> Array:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32, all stepped at once.

    Args:
      q_values: `q_values(params, obs) -> q`, over a batch.
      key: of these episodes; never one that training has used.
      num_episodes: in total.
      store: how `q_values` wants each observation, `Network.store`.
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
        view = push_frame(view, store(result.observation), nobody, frame_stack)
        return time + 1, result.state, view, has_ended, returns

    def is_running(carry: tuple) -> Array:
        time, _, _, has_ended, _ = carry
        return (time < limit) & ~jnp.all(has_ended)

    start = (jnp.int32(0), env_state, init_view(store(obs), frame_stack), nobody, jnp.zeros(num_episodes))
    return jax.lax.while_loop(is_running, step, start)[-1]


def host_greedy_returns(
    lanes: HostLanes,
    spec: EnvSpec,
    act: Callable[[Array], Array],
    num_episodes: int,
    seed: int,
    store: Callable[[Array], Array] = as_it_comes,
) -> np.ndarray:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32.

    Every lane plays its share of them, the first ones from its seed: to take whichever end first would favour the
    short. An episode whose environment fails is played anew by the next lane, for what fails here may always fail here.

    Args:
      lanes: at least one; they are reset.
      spec: of their environment.
      act: `act(view) -> action`, `[lanes, ...]` stored frames, stacked, to `[lanes]`.
      num_episodes: in total.
      seed: of these episodes; never one that training has used.
      store: how `act` wants each observation, `Network.store`.
    """
    limit = spec.time_limit or MAX_EPISODE_STEPS
    push = jax.jit(lambda view, obs, is_first: push_frame(view, store(obs), is_first, spec.frame_stack))
    obs = lanes.reset(seed)
    num_lanes = len(obs)
    quota = np.array([len(range(i, num_episodes, num_lanes)) for i in range(num_lanes)])
    view = init_view(store(jnp.asarray(obs)), spec.frame_stack)
    is_final, total, steps = np.zeros(num_lanes, bool), np.zeros(num_lanes), np.zeros(num_lanes, np.int64)
    returns: list[list[float]] = [[] for _ in range(num_lanes)]
    while any(len(each) < share for each, share in zip(returns, quota, strict=True)):
        lanes.send(np.asarray(act(view), np.int32))
        step = lanes.recv()
        is_new = is_final | step.failed
        total, steps = np.where(is_new, 0.0, total + step.reward), np.where(is_new, 0, steps + 1)
        is_final = (step.terminated | step.truncated) & ~is_new
        for i in np.flatnonzero(step.failed):
            if len(returns[i]) < quota[i]:
                quota[i], quota[(i + 1) % num_lanes] = quota[i] - 1, quota[(i + 1) % num_lanes] + 1
        for i in np.flatnonzero(is_final | (steps == limit)):
            if len(returns[i]) < quota[i]:
                returns[i].append(float(total[i]))
        view = push(view, step.observation, is_new)
    return np.array([value for each in returns for value in each], np.float32)
