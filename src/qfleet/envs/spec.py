"""The contract of environments written in JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.core.types import EnvSpec

__all__ = ["EnvSpec", "EnvState", "InGraphEnv", "StepResult"]

EnvState = Any  # a pytree of arrays, whatever the environment needs


class StepResult(NamedTuple):
    """What one step of one environment returns. Time limits are not its business: `EnvSpec.time_limit` is."""

    state: EnvState
    observation: jax.Array
    """`observation_shape`, of the state after the step: the final observation if the step ended the episode."""
    reward: jax.Array
    """`[]` float32."""
    terminated: jax.Array
    """`[]` bool: the episode ended in a state without a future, which is worth 0."""
    truncated: jax.Array
    """`[]` bool: the environment cut the episode short; its last state still has a value."""


class InGraphEnv(NamedTuple):
    """One environment as pure functions of one lane; lanes are `jax.vmap` of them.

    `reset(key) -> (state, observation)` starts an episode, `step(state, action, key) -> StepResult` takes one step.
    Neither resets by itself: the lanes do, and keep the final observation.
    """

    spec: EnvSpec
    reset: Callable[[jax.Array], tuple[EnvState, jax.Array]]
    step: Callable[[EnvState, jax.Array, jax.Array], StepResult]
    render: Callable[[EnvState, np.ndarray], np.ndarray] | None = None
    """`render(state, observation) -> [height, width, 3]` uint8, an RGB picture for `qfleet watch`: NumPy in and out,
    never compiled. None: observations are drawn where they are pictures themselves."""
