"""Many lanes of one environment, stepped at once inside a compiled loop, with NEXT_STEP autoreset.

The row after an episode's end holds its *final observation*: the action there is ignored, the reward is 0, and the
lane starts a new episode in the row that follows. So the successor of a row is always the next row, and an episode
that was cut short can be valued from where it really ended.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qfleet.envs.spec import EnvState, InGraphEnv


class Lanes(NamedTuple):
    """Where every lane stands between two rows. Leading axis `[lanes]` everywhere."""

    env_state: EnvState
    observation: jax.Array
    """`[lanes, *observation_shape]`, what the next row will hold."""
    final: jax.Array
    """`[lanes]` bool: `observation` is an episode's last; its action is ignored and the lane starts anew."""
    episode_steps: jax.Array
    """`[lanes]` int32, steps taken in this episode."""


class StepKeys(NamedTuple):
    """The random inputs of a block of rows. Leading axes `[rows, lanes]`; one row is `[lanes]`."""

    keys: jax.Array
    """Keys for `env.step`."""
    fresh: tuple[EnvState, jax.Array]
    """New episodes, as `env.reset` returns them, for the lanes that need one."""


class LaneStep(NamedTuple):
    """What one row produced. `[lanes]` everywhere; 0 and False in the row that holds a final observation."""

    reward: jax.Array
    """float32."""
    terminated: jax.Array
    """bool."""
    truncated: jax.Array
    """bool; where `terminated` is True as well, the episode has no future to value."""


def init_lanes(env: InGraphEnv, key: jax.Array, numbers: jax.Array) -> Lanes:
    """Returns the lanes of these numbers, `[lanes]` integers, at the start of an episode each."""
    num_lanes = len(numbers)
    env_state, observation = jax.vmap(env.reset)(_lane_keys(key, numbers))
    return Lanes(env_state, observation, jnp.zeros(num_lanes, bool), jnp.zeros(num_lanes, jnp.int32))


def draw(env: InGraphEnv, key: jax.Array, num_rows: int, numbers: jax.Array) -> StepKeys:
    """Returns the random inputs of `num_rows` rows, to be scanned over together with `step_lanes`.

    They are made in bulk because random bits come from a loop of their own on CPU: inside the loop over rows that
    costs more than stepping a classic environment does. A lane's random inputs depend on the lane's number alone;
    `numbers` is `[lanes]` integers.
    """
    split = jax.vmap(lambda lane_key: jax.random.split(lane_key, num_rows), out_axes=1)
    # One key for both: a lane either steps or starts anew.
    keys = split(_lane_keys(key, numbers))
    return StepKeys(keys, jax.vmap(jax.vmap(env.reset))(keys))


def step_lanes(env: InGraphEnv, lanes: Lanes, action: jax.Array, step_keys: StepKeys) -> tuple[Lanes, LaneStep]:
    """Takes one step in every lane, or starts a new episode where the last one has ended.

    Args:
      env: the environment of every lane.
      lanes: where they stand.
      action: `[lanes]` int32, ignored where `lanes.final`.
      step_keys: one row of `draw`.

    Returns:
      The lanes after the row, and what it produced.
    """
    result = jax.vmap(env.step)(lanes.env_state, action, step_keys.keys)
    episode_steps = lanes.episode_steps + 1
    truncated = result.truncated
    if env.spec.time_limit is not None:
        truncated |= episode_steps >= env.spec.time_limit

    live = ~lanes.final
    row = LaneStep(jnp.where(live, result.reward, 0.0), live & result.terminated, live & truncated)

    def continued(stepped: jax.Array, fresh: jax.Array) -> jax.Array:
        return jnp.where(live.reshape(-1, *(1,) * (stepped.ndim - 1)), stepped, fresh)

    env_state, observation = jax.tree.map(continued, (result.state, result.observation), step_keys.fresh)
    return Lanes(env_state, observation, row.terminated | row.truncated, jnp.where(live, episode_steps, 0)), row


def _lane_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
