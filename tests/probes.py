"""Probe environments. Each is so small that its values are known, and that only one mistake can keep it from learning.

The idea is Andy Jones's ("Debugging RL, without the agonizing pain", 2021). If a probe fails while those before it
pass, its docstring says what is wrong. Observations are `[1]` float32.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qfleet
from qfleet.core.player import Player, make_player
from qfleet.core.types import Network, Recurrence
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult

FIRST, SECOND = 0.0, 1.0
"""Observations of `delayed_reward`. The probes with one state have FIRST only."""


def constant_reward() -> InGraphEnv:
    """One step, one action, reward 1, so the value is 1. Failure: the loss, its gradient or the optimiser is wrong."""
    return _make("constant-reward", 1, _always_first, lambda observation, action: jnp.float32(1.0))


def observation_reward() -> InGraphEnv:
    """One step, one action; the reward is the observation, -1 or 1. Failure: the network doesn't see its input."""
    return _make("observation-reward", 1, _random_sign, lambda observation, action: observation)


def delayed_reward() -> InGraphEnv:
    """Two steps (FIRST, SECOND) with rewards 0 and 1, so the values are the discount and 1.

    Failure: the bootstrap or the discount is wrong.
    """

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.float32(FIRST), jnp.array([FIRST])

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        at_second = state == SECOND
        reward = jnp.where(at_second, 1.0, 0.0)
        return StepResult(jnp.float32(SECOND), jnp.array([SECOND]), reward, at_second, jnp.bool_(False))

    return InGraphEnv(_spec("delayed-reward", num_actions=1), reset, step)


def action_reward() -> InGraphEnv:
    """One step, with reward -1 for action 0 and 1 for action 1. Failure: actions and values are paired wrongly."""
    return _make("action-reward", 2, _always_first, lambda observation, action: 2.0 * action - 1.0)


def observation_action_reward() -> InGraphEnv:
    """One step. Its reward is 1 if action 1 meets a positive observation or action 0 a negative one, and -1 otherwise.

    Failure: rows of a batch are mixed up, so that an observation, an action and a reward don't belong together.
    """
    return _make(
        "observation-action-reward", 2, _random_sign, lambda observation, action: observation * (2.0 * action - 1.0)
    )


def time_limit(steps: int = 5) -> InGraphEnv:
    """Endless steps with reward 1 and one observation, truncated after a few steps: the value is 1 / (1 - discount).

    Failure: truncation is treated as termination, so the value is about that of the few steps.
    """

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        return StepResult(state, state[None], jnp.float32(1.0), jnp.bool_(False), jnp.bool_(False))

    return InGraphEnv(_spec("time-limit", num_actions=1, time_limit=steps), _always_first, step)


def two_choices() -> InGraphEnv:
    """Two steps. The first action leads to the observation -1 or 1; the second one pays as `TWO_CHOICES_REWARDS` say.

    Failure: anything that the other probes find. Its values are learned only if observations, actions, rewards and the
    discount are all right. So it is the probe of whole runs, each of which can't try all the others.
    """

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.float32(FIRST), jnp.array([FIRST])

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        is_second = state != FIRST
        sign = 2.0 * action - 1.0
        reward = jnp.where(state == 1.0, 1.0, 0.5) * state * sign * is_second
        then = jnp.where(is_second, state, sign)
        return StepResult(then, then[None], reward, is_second, jnp.bool_(False))

    return InGraphEnv(_spec("two-choices", num_actions=2), reset, step)


TWO_CHOICES_REWARDS = {-1.0: [0.5, -0.5], 1.0: [-1.0, 1.0]}
"""What each action pays at each observation of the second step."""


def learn_two_choices(run_dir: Path, discount: float, summary: dict[str, Any]) -> dict[str, Any]:
    """Resumes a run of `two_choices` until its values are right, at most five times, and returns its newest summary.

    How many steps that takes depends on how stale parameters are, and so on what else the machine does.
    """
    for _ in range(5):
        if np.abs(_two_choices_errors(run_dir, discount)).max() < 0.1:
            return summary
        run = qfleet.resume(run_dir, env_steps=summary["env_steps"] + 1_000)
        for _ in run:
            pass
        summary = run.summary
    raise AssertionError(f"learned minus right values, a row per observation: {_two_choices_errors(run_dir, discount)}")


def _two_choices_errors(run_dir: Path, discount: float) -> np.ndarray:
    """Returns by how much the Q-values of a run of `two_choices` differ from those worked out by hand."""
    at_first = [discount * max(TWO_CHOICES_REWARDS[then]) for then in (-1.0, 1.0)]
    expected = {FIRST: at_first, **TWO_CHOICES_REWARDS}
    learned = qfleet.load(run_dir).q_values(np.array(list(expected), np.float32)[:, None])
    return learned - np.array(list(expected.values()))


def two_choices_settings(*, explore: bool = True) -> dict[str, Any]:
    """Returns settings with which 250 learner steps of 16 transitions are enough in one process.

    Args:
      explore: whether the topology's exploration decays; otherwise its actors have an epsilon each.
    """
    settings = {
        "env": "probes:TwoChoices-v0", "discount": 0.8, "hidden_sizes": (32,), "learning_rate": 5e-3, "n_step": 1,
        "target_update_period": 20,
    }  # fmt: skip
    return settings | ({"exploration_start": 0.5, "exploration_end": 0.5} if explore else {})


def nan_reward(at_step: int = 20) -> InGraphEnv:
    """Endless steps with reward 1, except NaN in step `at_step`, counted from 1. For tests of errors."""

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(0), jnp.array([FIRST])

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        steps = state + 1
        reward = jnp.where(steps == at_step, jnp.nan, 1.0)
        return StepResult(steps, jnp.array([FIRST]), reward, jnp.bool_(False), jnp.bool_(False))

    return InGraphEnv(_spec("nan-reward", num_actions=2), reset, step)


ALL = (
    constant_reward,
    observation_reward,
    delayed_reward,
    action_reward,
    observation_action_reward,
    time_limit,
    two_choices,
    nan_reward,
)


def _always_first(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.float32(FIRST), jnp.array([FIRST])


def _random_sign(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    sign = jax.random.rademacher(key, (), jnp.float32)
    return sign, sign[None]


def random_walk(frame_stack: int = 2) -> InGraphEnv:
    """A random walk with a time limit, and with chance in the start of an episode, in each step, and in its end."""

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jax.random.normal(key)
        return start, jnp.array([start, 0.0])

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        noise, chance = jax.random.uniform(key, (2,))
        state = state + noise - 0.5 + 0.1 * action
        return StepResult(state, jnp.array([state, noise]), -jnp.abs(state), chance < 0.1, chance > 0.95)

    spec = EnvSpec(
        name="random-walk",
        observation_shape=(2,),
        observation_dtype=np.dtype(np.float32),
        num_actions=2,
        frame_stack=frame_stack,
        time_limit=9,
    )
    return InGraphEnv(spec, reset, step)


def linear_network(spec: EnvSpec) -> Network:
    """Returns a linear Q-network for an environment with small observations."""
    num_inputs = math.prod(spec.agent_observation_shape)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {"w": 0.1 * jax.random.normal(key, (num_inputs, spec.num_actions)), "b": jnp.zeros(spec.num_actions)}

    return Network(init, lambda params, obs: obs.reshape(len(obs), -1) @ params["w"] + params["b"])


def summing_network(num_actions: int = 2) -> Network:
    """Returns a recurrent network without parameters, for `[1]` observations: q is the sum over the episode so far."""

    def outputs(total: jax.Array) -> jax.Array:
        return jnp.repeat(total, num_actions, axis=-1)

    def step(params: Any, carry: jax.Array, obs: jax.Array, is_first: jax.Array, draws: Any) -> Any:
        carry = jnp.where(is_first[:, None], 0.0, carry) + obs
        return carry, outputs(carry)

    def unroll(params: Any, carry: jax.Array, obs: jax.Array, is_first: jax.Array, draws: Any) -> Any:
        return jax.lax.scan(lambda carry, row: step(params, carry, *row, draws), carry, (obs, is_first))

    recurrence = Recurrence(lambda num_lanes: jnp.zeros((num_lanes, 1)), step, unroll)
    return Network(lambda key: {}, lambda params, obs: outputs(obs), recurrence=recurrence)


def linear_player(spec: EnvSpec) -> Player:
    """Returns the functions with which a linear Q-network plays."""
    return make_player(linear_network(spec), spec.frame_stack)


def _make(
    name: str,
    num_actions: int,
    reset: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    reward: Callable[[jax.Array, jax.Array], jax.Array],
) -> InGraphEnv:
    """Returns an environment of one step. Its state is its observation, and its reward depends on state and action."""

    def step(state: jax.Array, action: jax.Array, key: jax.Array) -> StepResult:
        return StepResult(state, state[None], jnp.float32(reward(state, action)), jnp.bool_(True), jnp.bool_(False))

    return InGraphEnv(_spec(name, num_actions), reset, step)


def _spec(name: str, num_actions: int, time_limit: int | None = None) -> EnvSpec:
    return EnvSpec(
        name=name,
        observation_shape=(1,),
        observation_dtype=np.dtype(np.float32),
        num_actions=num_actions,
        time_limit=time_limit,
    )


qfleet.register_env("TwoChoices-v0", two_choices)
