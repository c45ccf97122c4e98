"""Schedules that last until the end of a run."""

import dataclasses
import json

from qfleet.config import AgentConfig, FusedConfig, MeshConfig, OverlappedConfig, TrainConfig
from qfleet.config.encoding import decode, encode


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
