"""An environment in JAX with action masks, which pays NaN for an invalid action, so that a run ends there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qfleet
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult


def make_cells(mask: Any = None, **spec: Any) -> InGraphEnv:
    """Returns a corridor of four cells in JAX, whose mask is given or right."""
    allowed = jnp.array([[False, True], [True, True], [True, True], [False, False]])

    def observe(cell: jax.Array) -> jax.Array:
        return cell[None].astype(jnp.float32)

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        cell = jax.random.randint(key, (), 0, 3, jnp.int32)
        return cell, observe(cell)

    def step(cell: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        cell, is_valid = cell + 2 * action - 1, allowed[cell, action]
        reward = jnp.where(is_valid, 1.0, jnp.nan)
        return StepResult(cell, observe(cell), reward, cell == 3, jnp.bool_(False))

    def render(state: Any, observation: np.ndarray) -> np.ndarray:
        assert observation.shape == (1,)
        return np.zeros((4, 4, 3), np.uint8)

    shape = {"name": "Cells", "observation_shape": (1,), "observation_dtype": np.dtype(np.float32), "num_actions": 2}
    return InGraphEnv(
        EnvSpec(**{**shape, "time_limit": 6, **spec}), reset, step, render, mask or (lambda cell: allowed[cell])
    )


qfleet.register_env("Cells", make_cells)
