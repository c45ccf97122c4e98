"""The loss of an agent, and the settings that describe the agent."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.agent import make_agent
from qfleet.core.exploration import make_explore
from qfleet.core.types import Network, Regression, Transition

NUM_ACTIONS = 3


def linear(params, obs):
    return obs @ params


LINEAR = Network(init=lambda key: jax.random.normal(key, (2, NUM_ACTIONS)), apply=linear)
PARAMS, TARGET_PARAMS = jax.random.normal(jax.random.key(0), (2, 2, NUM_ACTIONS))
BATCH = Transition(
    obs=jnp.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0], [-1.0, 1.0]]),
    action=jnp.array([0, 2, 1, 1]),
    reward=jnp.array([1.0, -1.0, 0.0, 3.0]),
    discount=jnp.array([0.9, 0.0, 0.81, 0.9]),  # the second terminated, the third is two steps long
    next_obs=jnp.array([[0.0, 1.0], [1.0, 1.0], [3.0, 0.5], [-2.0, 0.5]]),
    weight=jnp.array([1.0, 0.5, 2.0, 0.0]),
)


def expected_target(double):
    """Returns the targets by their definitions, row by row."""
    rows = []
    for reward, discount, next_obs in zip(BATCH.reward, BATCH.discount, np.asarray(BATCH.next_obs), strict=True):
        values = next_obs @ np.asarray(TARGET_PARAMS)
        picked = np.argmax(next_obs @ np.asarray(PARAMS if double else TARGET_PARAMS))
        rows.append(reward + discount * values[picked])
    return np.array(rows)


@pytest.mark.parametrize("double", [False, True])
def test_td_errors_and_the_weighted_loss_follow_the_definitions(double):
    agent = make_agent(LINEAR, AgentConfig(double=double, loss="squared"))
    loss, found = agent.loss(PARAMS, TARGET_PARAMS, BATCH)
    values = np.asarray(linear(PARAMS, BATCH.obs))[np.arange(4), BATCH.action]
    expected = expected_target(double) - values
    np.testing.assert_allclose(found.td_error, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(BATCH.weight * 0.5 * expected**2), rtol=1e-5)
    assert not np.allclose(expected_target(True), expected_target(False))


@pytest.mark.parametrize("double", [False, True])
def test_the_gradient_moves_the_value_of_the_action_taken_and_nothing_else(double):
    """No gradient flows through the bootstrap of either network, or to the target parameters."""
    agent = make_agent(LINEAR, AgentConfig(double=double, loss="squared"))
    gradient, target_gradient = jax.grad(lambda *args: agent.loss(*args)[0], (0, 1))(PARAMS, TARGET_PARAMS, BATCH)
    _, found = agent.loss(PARAMS, TARGET_PARAMS, BATCH)
    pushes = -(BATCH.weight * found.td_error / 4)[:, None] * jax.nn.one_hot(BATCH.action, NUM_ACTIONS)
    np.testing.assert_allclose(gradient, BATCH.obs.T @ pushes, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(target_gradient, 0)
    np.testing.assert_array_equal(found.priority, found.td_error)


def test_a_batch_with_targets_of_its_own_is_regressed_on_them():
    agent = make_agent(LINEAR, AgentConfig(replay="none", loss="squared"))
    batch = Regression(BATCH.obs, BATCH.action, target=jnp.array([1.0, 2.0, 3.0, 4.0]), weight=BATCH.weight)
    loss, found = agent.loss(PARAMS, (), batch)
    expected = np.arange(1, 5) - np.asarray(linear(PARAMS, BATCH.obs))[np.arange(4), BATCH.action]
    np.testing.assert_allclose(found.td_error, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(BATCH.weight * 0.5 * expected**2), rtol=1e-5)


def test_huber_clips_the_gradient_of_each_transition():
    agent = make_agent(LINEAR, AgentConfig(huber_delta=0.1))
    batch = BATCH._replace(reward=jnp.full(4, 100.0))
    gradient = jax.grad(lambda params: agent.loss(params, TARGET_PARAMS, batch)[0])(PARAMS)
    pushes = -(batch.weight * 0.1 / 4)[:, None] * jax.nn.one_hot(batch.action, NUM_ACTIONS)
    np.testing.assert_allclose(gradient, batch.obs.T @ pushes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("exploration", "expected"), [("epsilon_greedy", [0, 0]), ("softmax", [1, 1])])
def test_the_config_names_how_to_explore(exploration, expected):
    """The values are 9 and 0. At epsilon 1 a third of the numbers means action 0; at temperature 1 hardly any does."""
    explore = make_explore(AgentConfig(exploration=exploration))
    q = jnp.array([[0.0, 9.0, 0.0]] * 2)
    np.testing.assert_array_equal(explore(q, jnp.float32(1.0), jnp.array([0.1, 0.3])), expected)


def test_a_network_of_the_users_own_gives_the_parameters_and_the_values():
    agent = make_agent(LINEAR, AgentConfig())
    params = agent.init(jax.random.key(0))
    np.testing.assert_array_equal(agent.q_values(params, BATCH.obs), linear(params, BATCH.obs))


INVALID = [
    *({name: value} for name in ("discount", "target_update_rate") for value in (0.0, 1.01, -0.1, math.nan)),
    *(
        {name: value}
        for name in (
            "trace_decay",
            "priority_exponent",
            "importance_exponent_start",
            "learning_rate_end_fraction",
        )
        for value in (-0.01, 1.01, math.nan)
    ),
    *(
        {name: value}
        for name in (
            "n_step",
            "batch_size",
            "replay_capacity",
            "target_update_period",
            "rollout_length",
            "num_epochs",
            "num_minibatches",
            "exploration_env_steps",
            "learning_rate_learner_steps",
            "importance_exponent_env_steps",
        )
        for value in (0, -1, 2.5)
    ),
    *(
        {name: value}
        for name in ("huber_delta", "learning_rate", "env_steps_per_learner_step")
        for value in (0.0, -1.0, math.inf, math.nan)
    ),
    *({"warmup_env_steps": value} for value in (-1, 0.5)),
    *({"max_gradient_norm": value} for value in (0.0, -1.0, math.nan)),
    *({"hidden_sizes": value} for value in ((0,), (64, 0))),
    *({"munchausen_weight": value} for value in (-0.1, 1.1)),
    *({"munchausen_clip": value} for value in (0.1, math.nan)),
    *({name: value} for name in ("munchausen_temperature", "noisy_std", "hl_gauss_smoothing") for value in (0.0, -1.0)),
    *({name: 0} for name in ("num_quantiles", "num_acting_quantiles", "num_cosines")),
    {"num_atoms": 1},
    {"hl_gauss_smoothing": 1e7},
    {"munchausen_temperature": 1e-9},
    {"value_min": 11.0},
    {"exploration_start": 1.1},
    {"exploration_start": 0.1, "exploration_end": 0.2},
    {"exploration_end": -0.1},
    {"exploration_start": math.nan},
    {"exploration_end": 0.0, "exploration_schedule": "exponential"},
    {"exploration_end": 0.0, "exploration": "softmax"},
    {"learning_rate_schedule": "exponential", "learning_rate_end_fraction": 0.0},
]


@pytest.mark.parametrize("settings", INVALID, ids=str)
def test_an_impossible_setting_is_refused_by_name_rule_and_value(settings):
    name, value = next(iter(settings.items()))
    names = "learning_rate_end_fraction" if name == "learning_rate_schedule" else name
    shown = {"learning_rate_schedule": 0.0, "hidden_sizes": 0}.get(name, value)
    with pytest.raises(ConfigError) as error:
        AgentConfig(**settings)
    message = str(error.value)
    assert names in message and " must be " in message
    assert str(shown) in message


MISSPELT = [
    {"loss": "hubber"},
    {"torso": "cnn"},
    {"convolution": "patch"},
    {"exploration": "sofmax"},
    {"exploration_schedule": "exponential_decay"},
    {"learning_rate_schedule": "cosin"},
    {"replay": "prioritized"},
    {"importance_normalisation": "max"},
    {"head": "quantile"},
]


@pytest.mark.parametrize("settings", MISSPELT, ids=str)
def test_a_misspelt_choice_is_refused_rather_than_taken_for_another(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        AgentConfig(**settings)


def test_an_infinite_temperature_is_refused():
    """It would decay to NaN."""
    with pytest.raises(ConfigError, match="exploration_start"):
        AgentConfig(exploration="softmax", exploration_start=math.inf)


def test_atoms_that_float32_can_not_tell_apart_are_refused():
    """Their distance would be 0, and the projection NaN."""
    with pytest.raises(ConfigError, match=r"distance between two atoms must be above 100, .* num_atoms=51, got 0\.02"):
        AgentConfig(value_min=1e8, value_max=1e8 + 1)


VALID = [
    {"discount": 1.0, "target_update_rate": 1.0},
    {"trace_decay": 0.0},
    {"trace_decay": 1.0},
    {"warmup_env_steps": 0},
    {"max_gradient_norm": None},
    {"exploration_start": 0.0, "exploration_end": 0.0},
    {"exploration": "softmax", "exploration_start": 50.0, "exploration_end": 0.01},
    {"hidden_sizes": ()},
]


@pytest.mark.parametrize("settings", VALID, ids=str)
def test_the_edge_of_what_is_possible_is_possible(settings):
    config = AgentConfig(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


def test_a_config_never_changes():
    config = AgentConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.discount = 0.5
    assert dataclasses.replace(config, discount=0.5).discount == 0.5
    with pytest.raises(ConfigError):
        dataclasses.replace(config, discount=2.0)


def test_the_replay_ratio_is_how_often_an_env_step_is_learned_from():
    assert AgentConfig(batch_size=32, env_steps_per_learner_step=4).replay_ratio == 8
    assert AgentConfig(replay="none", num_epochs=3, num_minibatches=4).replay_ratio == 3
