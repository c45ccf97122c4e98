"""Schedules that last until the end of a run."""

import dataclasses
import json

import pytest

from qfleet.config import AgentConfig, ConfigError, FusedConfig, MeshConfig, OverlappedConfig, TrainConfig
from qfleet.config.encoding import decode, encode
from qfleet.presets import make_config


def config_of(env_steps: int = 100_000, **agent) -> TrainConfig:
    return TrainConfig(env="CartPole-v1", env_steps=env_steps, agent=AgentConfig(**agent))


def test_schedules_to_the_end_get_the_length_of_the_run_and_keep_it_when_it_is_extended():
    config = config_of(importance_exponent_env_steps=None, learning_rate_learner_steps=None)
    begun = config.with_schedule_lengths()
    assert begun.agent.importance_exponent_env_steps == 100_000
    assert begun.agent.learning_rate_learner_steps == begun.num_learner_steps == 9_900
    extended = dataclasses.replace(begun, env_steps=200_000).with_schedule_lengths()
    assert extended.agent == begun.agent
    for each in (config, begun):
        assert decode(json.loads(json.dumps(encode(each)))) == each


def test_schedules_may_be_given_as_shares_of_the_run():
    config = config_of(
        exploration_fraction=0.1, importance_exponent_fraction=0.5, learning_rate_fraction=0.25, replay="prioritised"
    )
    begun = config.with_schedule_lengths()
    assert begun.agent.exploration_env_steps == 10_000
    assert begun.agent.importance_exponent_env_steps == 50_000
    assert begun.agent.learning_rate_learner_steps == 2_475
    extended = dataclasses.replace(begun, env_steps=200_000).with_schedule_lengths()
    assert extended.agent == begun.agent, "a run that is extended keeps the schedules that it began with"


def test_a_share_and_a_length_of_one_schedule_are_refused():
    with pytest.raises(ConfigError, match="exploration_env_steps must be left out with exploration_fraction"):
        make_config("CartPole-v1", "dqn", exploration_fraction=0.1, exploration_env_steps=1_000)
    tuned = make_config("CartPole-v1", "double_dqn", exploration_fraction=0.1, env_steps=50_000)
    assert tuned.with_schedule_lengths().agent.exploration_env_steps == 5_000, "in place of the tuned length"
    with pytest.raises(ConfigError, match="warmup_env_steps must be below exploration_env_steps"):
        make_config("CartPole-v1", "dqn", exploration_fraction=0.01, env_steps=10_000)
    with pytest.raises(ConfigError, match="exploration_fraction must come with a topology whose exploration decays"):
        make_config("CartPole-v1", "dqn", "actor-learner", exploration_fraction=0.1)


def test_schedules_of_given_lengths_stay():
    config = config_of(importance_exponent_env_steps=7, learning_rate_learner_steps=8)
    assert config.with_schedule_lengths() == config


def test_learner_steps_without_replay_are_counted_by_rollouts():
    agent = AgentConfig(replay="none", rollout_length=16, num_epochs=2, num_minibatches=4)
    config = TrainConfig(env="CartPole-v1", agent=agent, topology=FusedConfig(num_envs=32), env_steps=1_000)
    assert config.num_learner_steps == 2 * 2 * 4


def test_seeds_share_a_program_where_one_can_train_all():
    several = dataclasses.replace(config_of(), num_seeds=3, seed=5, run_dir="runs/all", video_period_env_steps=500)
    assert not several.has_seed_processes and list(several.seeds) == [5, 6, 7]
    on_a_mesh = dataclasses.replace(several, topology=FusedConfig(mesh=MeshConfig(data=2)))
    outside = dataclasses.replace(several, topology=OverlappedConfig())
    assert on_a_mesh.has_seed_processes and outside.has_seed_processes
    assert not dataclasses.replace(outside, num_seeds=1).has_seed_processes
    own = outside.of_seed(6)
    assert (own.seed, own.num_seeds, own.run_dir, own.has_seed_processes) == (6, 1, None, False)
    assert [outside.of_seed(seed).video_period_env_steps for seed in outside.seeds] == [500, None, None]
