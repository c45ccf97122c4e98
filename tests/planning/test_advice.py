"""Advice follows from the given settings, or isn't given."""

import pytest

from qfleet.planning.advice import advice_for
from qfleet.presets import make_config


@pytest.mark.parametrize("preset", ["dqn", "rainbow_lite", "pqn"])
def test_a_preset_needs_no_advice(preset: str) -> None:
    assert advice_for(make_config("CartPole-v1", preset), 5_000) == ()


def test_a_large_batch_is_questioned_for_a_small_network_only() -> None:
    config = make_config("CartPole-v1", "dqn", batch_size=4096, env_steps_per_learner_step=1000)
    (advice,) = advice_for(config, 5_000)
    assert "2508.14881" in advice.source
    assert advice_for(config, 5_000_000) == ()


def test_many_learner_steps_for_an_environment_step_are_questioned() -> None:
    (advice,) = advice_for(make_config("CartPole-v1", "dqn", batch_size=128, env_steps_per_learner_step=0.25), 5_000)
    assert advice.text.startswith("4 learner steps")
    assert advice_for(make_config("CartPole-v1", "dqn", batch_size=128, env_steps_per_learner_step=1), 5_000) == ()


def test_many_lanes_may_have_larger_batches() -> None:
    (advice,) = advice_for(make_config("CartPole-v1", "dqn", batch_size=32, num_envs=512), 5_000)
    assert "1803.02811" in advice.source


def test_more_lanes_before_longer_rollouts() -> None:
    config = make_config("CartPole-v1", "pqn", num_envs=8, rollout_length=64)
    assert any("more lanes" in advice.text for advice in advice_for(config, 5_000))
