"""Exploration: the exact share of uniform numbers that lead to each action, and the schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.config import AgentConfig, ConfigError
from qfleet.core import exploration
from qfleet.core.agent import make_agent
from qfleet.presets import make_config

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


def repeating(**settings):
    return AgentConfig(**{"exploration_max_duration": 1_000, **settings})


class Repeater:
    """Epsilon-z-greedy in plain Python, for one lane."""

    def __init__(self, epsilon, num_actions, config):
        self.epsilon, self.num_actions, self.action, self.num_left = epsilon, num_actions, 0, 0
        weights = [n**-config.exploration_duration_exponent for n in range(1, config.exploration_max_duration + 1)]
        self.survival = [np.float32(sum(weights[n:]) / sum(weights)) for n in range(1, len(weights))]

    def duration(self, uniform):
        bits = int(np.float32(uniform).view(np.uint32))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits = (bits ^ bits >> shift) * factor % 2**32
        share = np.float32(bits + 1) / np.float32(2**32)
        return 1 + sum(each > share for each in self.survival)

    def act(self, greedy, uniform, is_first):
        self.num_left = 0 if is_first else self.num_left
        if self.num_left:
            self.num_left -= 1
            return self.action
        if uniform >= self.epsilon:
            return greedy
        self.action = int(np.float32(uniform) / np.float32(self.epsilon) * self.num_actions)
        self.num_left = self.duration(uniform) - 1
        return self.action


def test_epsilon_z_greedy_repeats_as_plain_python_does_and_stops_with_the_episode():
    num_rows, num_lanes, epsilon = 120, 8, 0.25
    env, config = probes.random_walk(frame_stack=2), repeating(exploration_max_duration=30)
    network = probes.linear_network(env.spec)
    agent, params = make_agent(network, config, frame_stack=2), network.init(jax.random.key(3))
    random = np.random.default_rng(0)
    obs = random.normal(size=(num_rows + 1, num_lanes, *env.spec.observation_shape)).astype(np.float32)
    uniforms = random.random((num_rows, num_lanes), np.float32)
    is_first = random.random((num_rows + 1, num_lanes)) < 0.05

    def row(memory, inputs):
        uniform, obs, is_first = inputs
        acted = agent.act(params, memory, jnp.float32(epsilon), uniform)
        return agent.memory.observe(acted.memory, obs, is_first), (acted.action, jnp.argmax(acted.q, axis=-1))

    start = agent.memory.init(jnp.asarray(obs[0]))
    _, (actions, greedy) = jax.jit(lambda: jax.lax.scan(row, start, (uniforms, obs[1:], is_first[1:])))()
    lanes = [Repeater(epsilon, env.spec.num_actions, config) for _ in range(num_lanes)]
    expected = [
        [lanes[i].act(int(greedy[t, i]), uniforms[t, i], is_first[t, i] and t > 0) for i in range(num_lanes)]
        for t in range(num_rows)
    ]
    np.testing.assert_array_equal(actions, expected)
    assert np.mean(actions != greedy) > 0.2, "far more steps are random than begin a repetition"


def test_durations_have_the_shares_of_a_zeta_distribution_whatever_the_action():
    repeat, num = exploration.make_repeat(repeating()), 60_000
    uniform = jax.random.uniform(jax.random.key(0), (num,))
    action = exploration.epsilon_greedy(jnp.zeros((num, 3)), jnp.float32(1), uniform)
    repetition = repeat(action, jnp.float32(1), uniform, exploration.no_repetition(num))[1]
    weights = np.arange(1, 1_001) ** -2.0
    for chosen in range(3):
        durations = 1 + np.asarray(repetition.num_left)[np.asarray(action) == chosen]
        shares = np.bincount(durations, minlength=1_001)[1:] / len(durations)
        np.testing.assert_allclose(shares[:4], (weights / weights.sum())[:4], atol=0.01)
        assert np.sum(shares[99:]) == pytest.approx(np.sum(weights[99:]) / weights.sum(), rel=0.5)


def test_repeated_actions_come_farther_than_random_ones():
    """In a corridor with two directions, 100 steps of a random agent end some 10 steps away."""
    num_lanes, reached = 200, {}
    for name, config in {"greedy": AgentConfig(), "z": repeating()}.items():
        agent = make_agent(probes.summing_network()._replace(recurrence=None), config)

        def row(memory, uniform, agent=agent):
            acted = agent.act({}, memory, jnp.float32(1), uniform)
            return acted.memory, 2 * acted.action - 1

        uniforms = jax.random.uniform(jax.random.key(1), (100, num_lanes))
        _, moves = jax.lax.scan(row, agent.memory.init(jnp.zeros((num_lanes, 1))), uniforms)
        reached[name] = np.mean(np.max(np.abs(np.cumsum(moves, axis=0)), axis=0))
    assert reached["z"] > 2 * reached["greedy"]


def test_repetitions_are_refused_where_they_have_no_effect():
    for settings, message in (
        ({"exploration": "softmax"}, "be left out with exploration softmax.*choose exploration epsilon_greedy"),
        ({"exploration_start": 0.0, "exploration_end": 0.0}, "be left out with exploration_start 0.0"),
    ):
        with pytest.raises(ConfigError, match=f"exploration_max_duration must {message}"):
            make_config("CartPole-v1", "dqn", exploration_max_duration=100, **settings)
    with pytest.raises(ConfigError, match="exploration_duration_exponent must be left out with .*duration 1"):
        make_config("CartPole-v1", "dqn", exploration_duration_exponent=1.5)
