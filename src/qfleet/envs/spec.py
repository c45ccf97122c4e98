"""The contract of environments written in JAX."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.core.masks import join, split_lanes
from qfleet.core.types import EnvSpec

__all__ = ["EnvSpec", "EnvState", "InGraphEnv", "StepResult", "with_masks_joined"]

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
    action_mask: Callable[[EnvState], jax.Array] | None = None
    """`action_mask(state) -> [num_actions]` bool, the valid actions of a state; None if all are valid in all states.

    At least one must be valid, except in a state that terminated an episode. `make_env` then joins masks and
    observations: see `with_masks_joined`."""


def with_masks_joined(env: InGraphEnv) -> InGraphEnv:
    """Returns the environment with observations that are joined with action masks, if it has masks.

    Everything that trains or evaluates takes such environments; see `qfleet.core.masks`. A step to a state that goes on
    without a valid action pays NaN, which ends a run.
    """
    action_mask, render = env.action_mask, env.render
    if action_mask is None:
        return env
    spec = dataclasses.replace(env.spec, has_action_mask=True)

    def reset(key: jax.Array) -> tuple[EnvState, jax.Array]:
        state, observation = env.reset(key)
        return state, join(observation, action_mask(state), len(spec.observation_shape))

    def step(state: EnvState, action: jax.Array, key: jax.Array) -> StepResult:
        result = env.step(state, action, key)
        mask = action_mask(result.state)
        return result._replace(
            observation=join(result.observation, mask, len(spec.observation_shape)),
            reward=jnp.where(jnp.any(mask) | result.terminated, result.reward, jnp.nan),
        )

    def render_split(state: EnvState, observation: np.ndarray) -> np.ndarray:
        assert render is not None
        return render(state, split_lanes(observation, spec)[0])

    return InGraphEnv(spec, reset, step, render and render_split)
