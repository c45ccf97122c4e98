"""MountainCar-v0: a car that is too weak for the hill must first swing back to gather speed.

The dynamics are Gymnasium's (`gymnasium.envs.classic_control.mountain_car`, after Moore 1990), in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.envs import rendering
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult

FORCE = 0.001
GRAVITY = 0.0025
SPEED_LIMIT = 0.07
LEFT_WALL = -1.2
RIGHT_END = 0.6
GOAL = 0.5


def make() -> InGraphEnv:
    """Returns the environment. It observes the state, has three actions (left, none, right), and pays -1 a step."""
    spec = EnvSpec(
        name="MountainCar-v0",
        observation_shape=(2,),
        observation_dtype=np.dtype(np.float32),
        num_actions=3,
        time_limit=200,
    )
    return InGraphEnv(spec, reset, step, render)


def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Starts an episode at rest in the valley: position uniform in [-0.6, -0.4)."""
    state = jnp.stack([jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.float32(0.0)])
    return state, state


def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
    """Drives for one step. The episode terminates when the car reaches the goal while moving forward.

    Args:
      state: `[2]` float32, position along the track and velocity per step.
      action: `[]` integer, 0 left, 1 none, 2 right.
      key: not used.
    """
    position, velocity = state
    velocity += (action - 1) * FORCE - GRAVITY * jnp.cos(3 * position)
    velocity = jnp.clip(velocity, -SPEED_LIMIT, SPEED_LIMIT)
    position = jnp.clip(position + velocity, LEFT_WALL, RIGHT_END)
    velocity = jnp.where((position == LEFT_WALL) & (velocity < 0), 0.0, velocity)
    state = jnp.stack([position, velocity])
    terminated = (position >= GOAL) & (velocity >= 0)
    return StepResult(state, state, jnp.float32(-1.0), terminated, jnp.bool_(False))


def render(state: np.ndarray, observation: np.ndarray) -> np.ndarray:
    """Draws the hills as Gymnasium does, with the car on them and a flag at the goal."""
    position = float(state[0])
    canvas = rendering.Canvas(480, 320, left=LEFT_WALL, bottom=0.0, pixels_per_unit=480 / (RIGHT_END - LEFT_WALL))
    slope = [(x, _height(x)) for x in np.linspace(LEFT_WALL, RIGHT_END, 97).tolist()]
    canvas.polygon([(LEFT_WALL, 0.0), *slope, (RIGHT_END, 0.0)], rendering.GREEN)
    foot = _height(GOAL)
    canvas.line([(GOAL, foot), (GOAL, foot + 0.16)], 0.008, rendering.INK)
    canvas.polygon([(GOAL, foot + 0.16), (GOAL, foot + 0.1), (GOAL + 0.07, foot + 0.13)], rendering.ORANGE)
    angle = math.atan(1.35 * math.cos(3 * position))  # slope of the hill: the derivative of `_height`

    def of_car(along: float, above: float) -> tuple[float, float]:
        x = position + along * math.cos(angle) - above * math.sin(angle)
        return x, _height(position) + along * math.sin(angle) + above * math.cos(angle)

    canvas.polygon([of_car(-0.07, 0.02), of_car(-0.07, 0.07), of_car(0.07, 0.07), of_car(0.07, 0.02)], rendering.BLUE)
    for along in (-0.04, 0.04):
        canvas.disc(of_car(along, 0.02), 0.02, rendering.INK)
    return canvas.picture()


def _height(position: float) -> float:
    return 0.45 * math.sin(3 * position) + 0.55
