"""CartPole-v1: push a cart left or right so that the pole on it stays up.

The dynamics are Gymnasium's (`gymnasium.envs.classic_control.cartpole`, after Barto, Sutton and Anderson 1983), in
float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.envs import rendering
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult

GRAVITY = 9.8
POLE_MASS = 0.1
TOTAL_MASS = 1.0 + POLE_MASS
POLE_HALF_LENGTH = 0.5
POLE_MASS_LENGTH = POLE_MASS * POLE_HALF_LENGTH
FORCE = 10.0
STEP_SECONDS = 0.02
POSITION_LIMIT = 2.4
ANGLE_LIMIT = math.radians(12)


def make() -> InGraphEnv:
    """Returns the environment. It observes the state, has two actions (left, right), and pays 1 a step."""
    spec = EnvSpec(
        name="CartPole-v1",
        observation_shape=(4,),
        observation_dtype=np.dtype(np.float32),
        num_actions=2,
        time_limit=500,
    )
    return InGraphEnv(spec, reset, step, render)


def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Starts an episode near rest: each part of the state is uniform in [-0.05, 0.05)."""
    state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return state, state


def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
    """Pushes the cart for `STEP_SECONDS`. The episode terminates once the cart or the pole passes its limit.

    Args:
      state: `[4]` float32: the position of the cart (metres), its velocity, the angle of the pole from upright
        (radians), and its angular velocity. It is one array because XLA would draw each new episode once per array.
      action: `[]` integer, 0 left, 1 right.
      key: not used.
    """
    position, velocity, angle, angular_velocity = state
    force = jnp.where(action == 1, FORCE, -FORCE)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (force + POLE_MASS_LENGTH * angular_velocity**2 * sine) / TOTAL_MASS
    angular_acceleration = (GRAVITY * sine - cosine * push) / (
        POLE_HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cosine**2 / TOTAL_MASS)
    )
    acceleration = push - POLE_MASS_LENGTH * angular_acceleration * cosine / TOTAL_MASS
    position += STEP_SECONDS * velocity
    velocity += STEP_SECONDS * acceleration
    angle += STEP_SECONDS * angular_velocity
    angular_velocity += STEP_SECONDS * angular_acceleration
    state = jnp.stack([position, velocity, angle, angular_velocity])
    terminated = (jnp.abs(position) > POSITION_LIMIT) | (jnp.abs(angle) > ANGLE_LIMIT)
    return StepResult(state, state, jnp.float32(1.0), terminated, jnp.bool_(False))


def render(state: np.ndarray, observation: np.ndarray) -> np.ndarray:
    """Draws the cart and the pole to scale, and the ends of the track."""
    position, _, angle, _ = map(float, state)
    canvas = rendering.Canvas(480, 200, left=-2.7, bottom=-0.6, pixels_per_unit=480 / 5.4)
    canvas.line([(-2.7, -0.15), (2.7, -0.15)], 0.02, rendering.INK)
    for end in (-POSITION_LIMIT, POSITION_LIMIT):
        canvas.line([(end, -0.3), (end, 0.0)], 0.03, rendering.ORANGE)
    left, right = position - 0.25, position + 0.25
    canvas.polygon([(left, -0.15), (left, 0.12), (right, 0.12), (right, -0.15)], rendering.INK)
    tip = position + 2 * POLE_HALF_LENGTH * math.sin(angle), 2 * POLE_HALF_LENGTH * math.cos(angle)
    canvas.line([(position, 0.0), tip], 0.09, rendering.ORANGE)
    canvas.disc((position, 0.0), 0.06, rendering.BLUE)
    return canvas.picture()
