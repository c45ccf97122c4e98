"""Many lanes of one environment, stepped at once inside a compiled loop, with NEXT_STEP autoreset.

When an episode ends, the next row holds its *final observation*. The action in that row is ignored and its reward is 0.
The row after it starts a new episode. So the successor of a row is always the next row, and an episode that was cut
short can be valued at the state where it really ended.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qfleet.envs.spec import EnvState, InGraphEnv


class Lanes(NamedTuple):
    """State of the lanes between two rows. Leading axis `[lanes]` everywhere."""

    env_state: EnvState
    observation: jax.Array
    """`[lanes, *lane_shape]`: the observations of the next row."""
    final: jax.Array
    """`[lanes]` bool: `observation` is the final one of an episode. The next action is ignored and starts a new one."""
    episode_steps: jax.Array
    """`[lanes]` int32, steps taken so far in this episode."""


class StepKeys(NamedTuple):
    """The random inputs of a block of rows. Leading axes `[rows, lanes]`; one row is `[lanes]`."""

    keys: jax.Array
    """Random keys for `env.step`."""
    fresh: tuple[EnvState, jax.Array]
    """New episodes, as `env.reset` returns them, for lanes that need one."""


class LaneStep(NamedTuple):
    """Results of one row, `[lanes]` everywhere. They are 0 and False in a row that holds a final observation."""

    reward: jax.Array
    """float32."""
    terminated: jax.Array
    """bool."""
    truncated: jax.Array
    """bool; if `terminated` is True as well, the last state of the episode has no value."""


def init_lanes(env: InGraphEnv, key: jax.Array, numbers: jax.Array) -> Lanes:
    """Returns lanes that have just started an episode. `numbers` are the lanes' numbers, `[lanes]` integers."""
    num_lanes = len(numbers)
    env_state, observation = jax.vmap(env.reset)(_lane_keys(key, numbers))
    return Lanes(env_state, observation, jnp.zeros(num_lanes, bool), jnp.zeros(num_lanes, jnp.int32))


def draw_step_keys(env: InGraphEnv, key: jax.Array, num_rows: int, numbers: jax.Array) -> StepKeys:
    """Returns the random inputs of `num_rows` rows, one for each call of `step_lanes` in a scan.

    They are made in bulk because on a CPU random bits are computed in a loop of their own. Inside the loop over rows,
    this would cost more than stepping a classic environment. The random inputs of a lane depend on its number and on no
    other lane. `numbers` are the lanes' numbers, `[lanes]` integers.
    """
    split = jax.vmap(lambda lane_key: jax.random.split(lane_key, num_rows), out_axes=1)
    # Steps and new episodes may share a key, because in one row a lane uses only one of them.
    keys = split(_lane_keys(key, numbers))
    return StepKeys(keys, jax.vmap(jax.vmap(env.reset))(keys))


def step_lanes(env: InGraphEnv, lanes: Lanes, action: jax.Array, step_keys: StepKeys) -> tuple[Lanes, LaneStep]:
    """Takes one step in every lane, or starts a new episode where the last one has ended.

    Args:
      env: the environment of every lane.
      lanes: the lanes before this row.
      action: `[lanes]` int32, ignored where `lanes.final`.
      step_keys: one row of `draw_step_keys`.

    Returns:
      The lanes after the row, and the results of the row.
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
