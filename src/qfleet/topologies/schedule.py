"""The host's plan for a program: how much to explore, and when to learn. The host's counts have no upper limit."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jax import Array

from qfleet.config import AgentConfig
from qfleet.config.agent import MIN_ENV_STEPS_PER_LEARNER_STEP
from qfleet.config.checks import MAX_COUNT, MAX_SIZE, check
from qfleet.config.values import MAX_FLOAT
from qfleet.core import exploration

ROWS_PER_ITERATION = 16
"""Rows of one iteration with replay. Drawing their random numbers at once is cheaper than drawing row by row."""


class Plan(NamedTuple):
    """The decisions for each row of a chunk, `[iterations, rows]`."""

    exploration: Array | np.ndarray
    """float32, epsilon or temperature."""
    importance_exponent: Array | np.ndarray
    """float32, beta of prioritised replay."""
    num_updates: Array | np.ndarray
    """int32, learner steps after the row. Agents without a replay ignore it: they learn after each rollout."""


def rows_per_iteration(config: AgentConfig) -> int:
    """Returns how many steps each lane takes in one iteration, the unit in which runs stop."""
    return config.rollout_length if config.replay == "none" else ROWS_PER_ITERATION


NOTHING_FIXED: Mapping[str, float] = MappingProxyType({})


def changeable(config: AgentConfig) -> tuple[str, ...]:
    """Returns the settings that plans decide, so that they may change while a program runs."""
    with_replay = ("importance_exponent",) if config.replay == "prioritised" else ()
    return ("exploration", *with_replay, *(() if config.replay == "none" else ("env_steps_per_learner_step",)))


def check_fixed(config: AgentConfig, num_lanes: int, name: str, value: float) -> None:
    """Checks a value that replaces a schedule.

    Raises:
      ConfigError: if it is out of bounds.
    """
    if name == "env_steps_per_learner_step":
        least = max(MIN_ENV_STEPS_PER_LEARNER_STEP, num_lanes / MAX_SIZE)
        check(least <= value <= MAX_COUNT, name, f"{least:g} to {MAX_COUNT}", value)
    elif name == "exploration" and config.exploration != "epsilon_greedy":
        least, what = (1e-8, "a temperature") if config.exploration == "softmax" else (0.0, "a number")
        check(least <= value <= MAX_FLOAT, name, f"{what}, {least:g} to {MAX_FLOAT:g}", value)
    else:
        check(0 <= value <= 1, name, "in [0, 1]", value)


def make_plan(
    config: AgentConfig,
    num_lanes: int,
    num_iterations: int,
    env_steps: int,
    replay_starts_at: int,
    fixed: Mapping[str, float] = NOTHING_FIXED,
) -> Plan:
    """Returns the plan of the next iterations.

    Args:
      config: the agent's config, with its schedules.
      num_lanes: number of lanes, hence of environment steps in one row.
      num_iterations: number of iterations to plan.
      env_steps: environment steps taken so far.
      replay_starts_at: environment steps when the replay was last empty.
      fixed: values that replace the schedules of settings, among `changeable`, by name.
    """
    per_learner_step = fixed.get("env_steps_per_learner_step", config.env_steps_per_learner_step)
    shape = (num_iterations, rows_per_iteration(config))
    before = env_steps + num_lanes * np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    warmup = replay_starts_at + max(config.warmup_env_steps, num_lanes * (config.rows_after_start + 1))

    def learner_steps_due(env_steps: np.ndarray) -> np.ndarray:
        return np.floor(np.maximum(env_steps - warmup, 0) / per_learner_step).astype(np.int64)

    due = learner_steps_due(before + num_lanes) - learner_steps_due(before)
    return Plan(
        exploration=_at("exploration", exploration.exploration_at(config, before), fixed),
        importance_exponent=_at("importance_exponent", exploration.importance_exponent_at(config, before), fixed),
        num_updates=due.astype(np.int32),
    )


def _at(name: str, scheduled: np.ndarray, fixed: Mapping[str, float]) -> np.ndarray:
    return np.full_like(scheduled, fixed[name]) if name in fixed else scheduled


def learner_steps(config: AgentConfig, plan: Plan, num_iterations: int) -> int:
    """Returns how many learner steps the first iterations of a plan take."""
    if config.replay == "none":
        return num_iterations * config.num_epochs * config.num_minibatches
    return int(np.sum(plan.num_updates[:num_iterations], dtype=np.int64))
