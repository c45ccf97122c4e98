"""The contract of environments written in JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.core.types import EnvSpec

__all__ = ["EnvSpec", "EnvState", "InGraphEnv", "StepResult"]

EnvState = Any  # any pytree of arrays


class StepResult(NamedTuple):
    """Result of one step of one environment. Time limits don't show here; lanes apply `EnvSpec.time_limit`."""

    state: EnvState
    observation: jax.Array
    """`observation_shape`: the observation after the step, which is the final one if the step ended the episode."""
    reward: jax.Array
    """`[]` float32."""
    terminated: jax.Array
    """`[]` bool: the episode ended in a state without a future, whose value is 0."""
    truncated: jax.Array
    """`[]` bool: the environment cut the episode short. Its last state still has a value."""


class InGraphEnv(NamedTuple):
    """One environment as pure functions of one lane. Several lanes are `jax.vmap` of them.

    `reset(key) -> (state, observation)` starts an episode, `step(state, action, key) -> StepResult` takes one step.
    `step` must not reset the environment when the episode ends: the lanes do that, and keep the final observation.
    """

    spec: EnvSpec
    reset: Callable[[jax.Array], tuple[EnvState, jax.Array]]
    step: Callable[[EnvState, jax.Array, jax.Array], StepResult]
    render: Callable[[EnvState, np.ndarray], np.ndarray] | None = None
    """`render(state, observation) -> [height, width, 3]` uint8, an RGB picture for `qfleet watch`.

    It takes and returns NumPy arrays and is never compiled. Without it, observations are shown if they are pictures."""
