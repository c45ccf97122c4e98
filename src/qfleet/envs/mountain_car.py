"""MountainCar-v0: a car too weak for the hill must first swing back to gather speed.

The dynamics are Gymnasium's (`gymnasium.envs.classic_control.mountain_car`, after Moore 1990), in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult

FORCE = 0.001
GRAVITY = 0.0025
SPEED_LIMIT = 0.07
LEFT_WALL = -1.2
RIGHT_END = 0.6
GOAL = 0.5


def make() -> InGraphEnv:
    """Returns the environment: the observation is the state, three actions (left, none, right), reward -1 a step."""
    spec = EnvSpec(
        name="MountainCar-v0",
        observation_shape=(2,),
        observation_dtype=np.dtype(np.float32),
        num_actions=3,
        time_limit=200,
    )
    return InGraphEnv(spec, reset, step)


def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Starts an episode at rest in the valley: position uniform in [-0.6, -0.4)."""
    state = jnp.stack([jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.float32(0.0)])
    return state, state


def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
    """Drives for one step; terminates on reaching the goal in forward motion. Draws nothing from `key`.

    The state is `[2]` float32: position along the track, and velocity per step.
    """
    position, velocity = state
    velocity += (action - 1) * FORCE - GRAVITY * jnp.cos(3 * position)
    velocity = jnp.clip(velocity, -SPEED_LIMIT, SPEED_LIMIT)
    position = jnp.clip(position + velocity, LEFT_WALL, RIGHT_END)
    velocity = jnp.where((position == LEFT_WALL) & (velocity < 0), 0.0, velocity)
    state = jnp.stack([position, velocity])
    terminated = (position >= GOAL) & (velocity >= 0)
    return StepResult(state, state, jnp.float32(-1.0), terminated, jnp.bool_(False))
