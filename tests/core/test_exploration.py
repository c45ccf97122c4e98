"""Exploration: the exact share of uniform numbers that lead to each action, and the schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core import exploration

GRID = (np.arange(30_000) + 0.5) / 30_000
"""Midpoints of equal cells of [0, 1). The share of them that leads to an action is its probability, up to a cell per
edge."""


def measure(explore, q, level):
    """Returns the share of uniform numbers that lead to each action."""
    actions = explore(jnp.broadcast_to(q, (len(GRID), len(q))), jnp.float32(level), jnp.asarray(GRID, jnp.float32))
    assert actions.dtype == jnp.int32
    return np.bincount(actions, minlength=len(q)) / len(GRID)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("num_actions", [1, 2, 5, 18])
def test_epsilon_greedy_gives_each_action_its_share(epsilon, num_actions):
    q = jnp.sin(jnp.arange(num_actions, dtype=jnp.float32) + 1)
    expected = np.full(num_actions, epsilon / num_actions)
    expected[np.argmax(q)] += 1 - epsilon
    np.testing.assert_allclose(measure(exploration.epsilon_greedy, q, epsilon), expected, atol=2 / len(GRID))


def test_the_edges_of_the_uniform_number_stay_within_the_actions():
    q = jnp.array([0.0, 1.0, 0.0])
    edges = jnp.array(
        [0.0, np.nextafter(np.float32(0.3), np.float32(0)), 0.3, np.nextafter(np.float32(1), np.float32(0))]
    )
    lanes = jnp.broadcast_to(q, (4, 3))
    np.testing.assert_array_equal(exploration.epsilon_greedy(lanes, jnp.float32(0.3), edges), [0, 2, 1, 1])
    np.testing.assert_array_equal(exploration.softmax(lanes, jnp.float32(1e-3), edges), [1, 1, 1, 1])
    np.testing.assert_array_equal(exploration.softmax(lanes * 0, jnp.float32(1.0), edges), [0, 0, 0, 2])


def test_every_lane_may_have_its_own_level():
    q = jnp.broadcast_to(jnp.array([0.0, 1.0]), (2, 2))
    level, uniform = jnp.array([1.0, 0.0]), jnp.array([0.2, 0.2])
    np.testing.assert_array_equal(exploration.epsilon_greedy(q, level, uniform), [0, 1])
    np.testing.assert_array_equal(exploration.softmax(q, jnp.array([1e3, 1e-3]), uniform), [0, 1])


def test_the_first_of_equal_values_is_greedy():
    np.testing.assert_array_equal(exploration.greedy(jnp.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])), [1, 0])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("q", [[1.0], [0.3, 0.1, -0.5], [5.0, 5.0, 5.0, 5.0], [1e4, -1e4, 1e4]], ids=str)
def test_softmax_gives_each_action_its_share(q, temperature):
    q = jnp.array(q)
    expected = jax.nn.softmax(q / temperature)
    np.testing.assert_allclose(measure(exploration.softmax, q, temperature), expected, atol=2 / len(GRID))


def test_softmax_at_the_lowest_temperature_allowed_is_greedy():
    config = AgentConfig(exploration="softmax", exploration_start=1.0, exploration_end=1e-8)
    level = exploration.exploration_at(config, np.array(10**9))
    np.testing.assert_array_equal(measure(exploration.softmax, jnp.array([0.5, 1.0, 0.9]), level), [0, 1, 0])


def test_linear_exploration_goes_straight_from_start_to_end():
    config = AgentConfig(exploration_start=0.9, exploration_end=0.1, exploration_env_steps=1000, warmup_env_steps=0)
    levels = exploration.exploration_at(config, np.array([[0, 250], [500, 1000]]))
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, [[0.9, 0.7], [0.5, 0.1]], rtol=1e-6)


def test_exponential_exploration_falls_by_equal_factors():
    config = AgentConfig(
        exploration_schedule="exponential", exploration_start=1.0, exploration_end=0.01, exploration_env_steps=1000,
        warmup_env_steps=0,
    )  # fmt: skip
    levels = exploration.exploration_at(config, np.array([0, 250, 500, 1000]))
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, [1, 0.01**0.25, 0.1, 0.01], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_exploration_stays_at_its_end_beyond_any_32_bit_count(schedule):
    config = AgentConfig(exploration_schedule=schedule, exploration_end=0.05)
    steps = np.array([26_000, 2**31, 2**32 + 5, 10**15], np.int64)
    np.testing.assert_array_equal(exploration.exploration_at(config, steps), np.float32(0.05))


def test_a_schedule_longer_than_32_bits_does_not_wrap():
    config = AgentConfig(exploration_start=1.0, exploration_end=0.0, exploration_env_steps=2**34, warmup_env_steps=0)
    levels = exploration.exploration_at(config, np.array([2**31, 2**32, 2**33, 2**34], np.int64))
    np.testing.assert_array_equal(levels, [7 / 8, 3 / 4, 1 / 2, 0])


def test_exploration_may_stay_constant():
    for schedule in ("linear", "exponential"):
        config = AgentConfig(exploration_schedule=schedule, exploration_start=0.1, exploration_end=0.1)
        np.testing.assert_array_equal(exploration.exploration_at(config, np.arange(0, 10**5, 999)), np.float32(0.1))


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_actions_are_uniform_until_learning_begins_and_the_decay_begins_then(schedule):
    config = AgentConfig(exploration_schedule=schedule, warmup_env_steps=4_000, exploration_env_steps=10_000)
    levels = exploration.exploration_at(config, np.array([0, 3_999, 4_000, 4_001, 14_000]))
    np.testing.assert_array_equal(levels[:3], 1.0)
    assert levels[3] < 1.0
    np.testing.assert_allclose(levels[4], config.exploration_end, rtol=1e-6)


def test_without_replay_there_is_no_warm_up_and_exploration_decays_at_once():
    config = AgentConfig(replay="none", exploration_end=0.0, exploration_env_steps=1_000)
    np.testing.assert_allclose(exploration.exploration_at(config, np.array([0, 500, 1_000])), [1.0, 0.5, 0.0])


def test_the_importance_exponent_grows_to_one_and_stays():
    config = AgentConfig(importance_exponent_start=0.4, importance_exponent_env_steps=2**33)
    exponents = exploration.importance_exponent_at(config, np.array([0, 2**32, 2**33, 2**40], np.int64))
    assert exponents.dtype == np.float32
    np.testing.assert_allclose(exponents, [0.4, 0.7, 1.0, 1.0], rtol=1e-6)
