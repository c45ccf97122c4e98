"""Rules that concern a whole run: the warm-up, and schedules that last until its end."""

import dataclasses
import json

import pytest

from qfleet.config import ActorLearnerConfig, AgentConfig, ConfigError, FusedConfig, TrainConfig
from qfleet.config.encoding import decode, encode


def config_of(env_steps: int = 100_000, **agent) -> TrainConfig:
    return TrainConfig(env="CartPole-v1", env_steps=env_steps, agent=AgentConfig(**agent))


@pytest.mark.parametrize("warmup", [20_000, 50_000])
def test_a_warm_up_that_outlasts_the_run_is_refused(warmup):
    with pytest.raises(ConfigError, match=f"warmup_env_steps must be below env_steps=20000.* got {warmup}"):
        config_of(env_steps=20_000, warmup_env_steps=warmup)
    assert config_of(env_steps=20_000, warmup_env_steps=19_999, exploration_env_steps=20_000)


@pytest.mark.parametrize("warmup", [25_000, 50_000])
def test_a_warm_up_as_long_as_exploration_is_refused(warmup):
    with pytest.raises(ConfigError, match=f"warmup_env_steps must be below exploration_env_steps=25000.* got {warmup}"):
        config_of(warmup_env_steps=warmup)


def test_a_long_warm_up_is_no_fault_where_exploration_does_not_decay():
    config_of(warmup_env_steps=50_000, exploration_start=0.1, exploration_end=0.1)
    agent = AgentConfig(warmup_env_steps=50_000)
    TrainConfig(env="CartPole-v1", agent=agent, topology=ActorLearnerConfig())  # each actor has its own epsilon
    config_of(warmup_env_steps=50_000, env_steps=20_000, replay="none")  # there is no warm-up


def test_a_short_trial_run_needs_no_shorter_warm_up_than_the_default():
    assert config_of(env_steps=123).agent.warmup_env_steps == 1_000


def test_schedules_to_the_end_get_the_length_of_the_run_and_keep_it_when_it_is_extended():
    config = config_of(importance_exponent_env_steps=None, learning_rate_learner_steps=None)
    begun = config.with_schedule_lengths()
    assert begun.agent.importance_exponent_env_steps == 100_000
    assert begun.agent.learning_rate_learner_steps == begun.num_learner_steps == 9_900
    extended = dataclasses.replace(begun, env_steps=200_000).with_schedule_lengths()
    assert extended.agent == begun.agent
    for each in (config, begun):
        assert decode(json.loads(json.dumps(encode(each)))) == each


def test_schedules_of_given_lengths_stay():
    config = config_of(importance_exponent_env_steps=7, learning_rate_learner_steps=8)
    assert config.with_schedule_lengths() == config


def test_learner_steps_without_replay_are_counted_by_rollouts():
    agent = AgentConfig(replay="none", rollout_length=16, num_epochs=2, num_minibatches=4)
    config = TrainConfig(env="CartPole-v1", agent=agent, topology=FusedConfig(num_envs=32), env_steps=1_000)
    assert config.num_learner_steps == 2 * 2 * 4
