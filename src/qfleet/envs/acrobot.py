"""Acrobot-v1: torque on the joint of a two-link pendulum must swing its free end above a line.

The dynamics are Gymnasium's (`gymnasium.envs.classic_control.acrobot`, after Sutton and Barto's book), in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.envs import rendering
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult

GRAVITY = 9.8
LINK_MASS = 1.0
LINK_LENGTH = 1.0
LINK_CENTRE = 0.5
LINK_INERTIA = 1.0
STEP_SECONDS = 0.2
INNER_SPEED_LIMIT = 4 * math.pi
OUTER_SPEED_LIMIT = 9 * math.pi


Parts = tuple[jax.Array, ...]
"""Inner angle, outer angle, inner velocity and outer velocity, each `[]`, or the derivatives of these by time."""


def make() -> InGraphEnv:
    """Returns the environment. It has three actions (torque -1, 0, 1) and pays -1 a step until it reaches the line."""
    spec = EnvSpec(
        name="Acrobot-v1",
        observation_shape=(6,),
        observation_dtype=np.dtype(np.float32),
        num_actions=3,
        time_limit=500,
    )
    return InGraphEnv(spec, reset, step, render)


def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Starts an episode with the links hanging nearly still: each part of the state is uniform in [-0.1, 0.1)."""
    state = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    return state, _observe(*state)


def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
    """Applies a torque for `STEP_SECONDS`. The episode terminates once the free end is one link above the pivot.

    Args:
      state: `[4]` float32: the angle of the inner link from hanging down and of the outer link from the inner one
        (radians), and their velocities (radians per second).
      action: `[]` integer, the torque plus 1.
      key: not used.
    """
    inner, outer, inner_velocity, outer_velocity = _runge_kutta(tuple(state), (action - 1).astype(jnp.float32))
    inner, outer = _wrap(inner), _wrap(outer)
    inner_velocity = jnp.clip(inner_velocity, -INNER_SPEED_LIMIT, INNER_SPEED_LIMIT)
    outer_velocity = jnp.clip(outer_velocity, -OUTER_SPEED_LIMIT, OUTER_SPEED_LIMIT)
    terminated = -jnp.cos(inner) - jnp.cos(inner + outer) > 1.0
    return StepResult(
        state=jnp.stack([inner, outer, inner_velocity, outer_velocity]),
        observation=_observe(inner, outer, inner_velocity, outer_velocity),
        reward=jnp.where(terminated, 0.0, -1.0),
        terminated=terminated,
        truncated=jnp.bool_(False),
    )


def render(state: np.ndarray, observation: np.ndarray) -> np.ndarray:
    """Draws both links to scale, and the line that the free end must cross."""
    inner, outer = float(state[0]), float(state[1])
    joint = LINK_LENGTH * math.sin(inner), -LINK_LENGTH * math.cos(inner)
    end = joint[0] + LINK_LENGTH * math.sin(inner + outer), joint[1] - LINK_LENGTH * math.cos(inner + outer)
    canvas = rendering.Canvas(360, 360, left=-2.25, bottom=-2.25, pixels_per_unit=80)
    canvas.line([(-2.25, LINK_LENGTH), (2.25, LINK_LENGTH)], 0.02, rendering.GREY)
    canvas.line([(0.0, 0.0), joint], 0.16, rendering.BLUE)
    canvas.line([joint, end], 0.16, rendering.ORANGE)
    for point in ((0.0, 0.0), joint, end):
        canvas.disc(point, 0.08, rendering.INK)
    return canvas.picture()


def _observe(inner: jax.Array, outer: jax.Array, inner_velocity: jax.Array, outer_velocity: jax.Array) -> jax.Array:
    return jnp.stack([jnp.cos(inner), jnp.sin(inner), jnp.cos(outer), jnp.sin(outer), inner_velocity, outer_velocity])


def _wrap(angle: jax.Array) -> jax.Array:
    """Returns the same angle in [-pi, pi)."""
    return angle - 2 * math.pi * jnp.floor((angle + math.pi) / (2 * math.pi))


def _runge_kutta(parts: Parts, torque: jax.Array) -> Parts:
    """Returns the state after `STEP_SECONDS`, by one step of the classical Runge-Kutta method of fourth order."""

    def slope_after(seconds: float, slope: Parts) -> Parts:
        return _slope(tuple(x + seconds * dx for x, dx in zip(parts, slope, strict=True)), torque)

    k1 = _slope(parts, torque)
    k2 = slope_after(STEP_SECONDS / 2, k1)
    k3 = slope_after(STEP_SECONDS / 2, k2)
    k4 = slope_after(STEP_SECONDS, k3)
    return tuple(
        x + STEP_SECONDS / 6 * (a + 2 * b + 2 * c + d) for x, a, b, c, d in zip(parts, k1, k2, k3, k4, strict=True)
    )


def _slope(parts: Parts, torque: jax.Array) -> Parts:
    """Returns the derivative of the state by time, under a torque (newton metres) on the joint between the links."""
    inner, outer, inner_velocity, outer_velocity = parts
    sine, cosine = jnp.sin(outer), jnp.cos(outer)
    lever = LINK_MASS * LINK_LENGTH * LINK_CENTRE
    outer_inertia = LINK_MASS * LINK_CENTRE**2 + LINK_INERTIA
    d1 = LINK_MASS * (LINK_CENTRE**2 + LINK_LENGTH**2) + 2 * lever * cosine + LINK_INERTIA + outer_inertia
    d2 = outer_inertia + lever * cosine
    # Gymnasium writes these sines as cosines of the angle minus a right angle.
    phi2 = LINK_MASS * LINK_CENTRE * GRAVITY * jnp.sin(inner + outer)
    phi1 = (
        -lever * outer_velocity**2 * sine
        - 2 * lever * outer_velocity * inner_velocity * sine
        + LINK_MASS * (LINK_CENTRE + LINK_LENGTH) * GRAVITY * jnp.sin(inner)
        + phi2
    )
    outer_acceleration = (torque + d2 / d1 * phi1 - lever * inner_velocity**2 * sine - phi2) / (
        outer_inertia - d2**2 / d1
    )
    inner_acceleration = -(d2 * outer_acceleration + phi1) / d1
    return inner_velocity, outer_velocity, inner_acceleration, outer_acceleration
