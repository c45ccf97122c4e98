"""What a new run is refused for: settings that its mode ignores, and a run that would learn nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qfleet
from qfleet.config import TOPOLOGIES, ActorLearnerConfig, AgentConfig, ConfigError, TrainConfig
from qfleet.config.encoding import decode, encode
from qfleet.config.new_run import settings_without_effect
from qfleet.presets import PRESETS, TUNED, make_config
from qfleet.runtime.run_directory import RunDirectory

WITHOUT_EFFECT = [
    ("pqn", "double", True), ("pqn", "n_step", 3), ("pqn", "target_update_rate", 0.005), ("pqn", "batch_size", 64),
    ("pqn", "target_update_period", 1), ("pqn", "warmup_env_steps", 5_000), ("pqn", "replay_capacity", 10_000),
    ("pqn", "env_steps_per_learner_step", 1.0), ("pqn", "priority_exponent", 0.5), ("pqn", "huber_delta", 2.0),
    ("pqn", "learning_rate_learner_steps", 500), ("dqn", "learning_rate_end_fraction", 0.1),
    ("dqn", "trace_decay", 0.9), ("dqn", "num_epochs", 4), ("dqn", "num_minibatches", np.int64(4)),
    ("dqn", "rollout_length", 32), ("dqn", "importance_exponent_start", 0.5), ("rainbow_lite", "trace_decay", 0.5),
    ("dqn", "importance_normalisation", "batch_max"), ("pqn", "importance_normalisation", "batch_max"),
    ("dqn", "num_atoms", 21), ("iqn", "value_max", 5.0), ("c51", "num_quantiles", 8), ("qr_dqn", "num_cosines", 8),
    ("c51", "loss", "squared"), ("c51", "huber_delta", 2.0), ("c51", "hl_gauss_smoothing", 1.0),
    ("munchausen", "double", True), ("dqn", "munchausen_clip", -2.0), ("dqn", "noisy_std", 0.1),
    ("dqn", "importance_exponent_fraction", 0.5), ("dqn", "learning_rate_fraction", 0.5), ("pqn", "munchausen", True),
    ("dqn", "memory_size", 64), ("dqn", "burn_in", 4), ("dqn", "sequence_length", 8), ("dqn", "sequence_period", 4),
    ("dqn", "priority_max_share", 0.5), ("pqn", "value_rescaling", True),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "name", "value"), WITHOUT_EFFECT)
def test_a_setting_that_the_mode_ignores_is_refused_by_name(preset: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be left out with .* no effect, got .?{value}.?; leave it out"):
        make_config("gymnax:SpaceInvaders-MinAtar", preset, **{name: value})
    default = getattr(AgentConfig(), name)
    if name != "target_update_rate":
        assert getattr(make_config("gymnax:SpaceInvaders-MinAtar", preset, **{name: default}).agent, name) == default


def test_convolutions_without_any_are_refused() -> None:
    with pytest.raises(ConfigError, match="convolution must be left out with torso mlp"):
        make_config("CartPole-v1", "dqn", torso="mlp", convolution="native")


@pytest.mark.parametrize("torso", ["auto", "mlp", "minatar", "nature", "hadamax"])
@pytest.mark.parametrize("setting", [{"spectral_norm": True}, {"adaptive_pooling": 6}, {"torso_width": 2}])
def test_an_option_of_another_torso_is_refused_by_name(torso: str, setting: dict[str, Any]) -> None:
    (name,) = setting
    if name == "torso_width" and torso not in ("auto", "mlp"):
        assert make_config("CartPole-v1", "dqn", torso=torso, **setting).agent.torso_width == 2
        return
    with pytest.raises(ConfigError, match=f"{name} must be left out with torso {torso}, .* impala"):
        make_config("CartPole-v1", "dqn", torso=torso, **setting)


def test_a_config_made_by_hand_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    agent = AgentConfig(replay="none", double=True, exploration_env_steps=10_000)
    config = TrainConfig(env="CartPole-v1", agent=agent, run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="double must be left out with replay none"):
        qfleet.train(config)
    agent = AgentConfig(exploration_start=0.5)
    config = TrainConfig(env="CartPole-v1", agent=agent, topology=ActorLearnerConfig(), run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="exploration_start must come with a topology whose exploration decays"):
        qfleet.train(config)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_such_a_config_is_still_read(tmp_path: Path) -> None:
    agent = AgentConfig(replay="none", double=True, n_step=3, target_update_rate=0.5, target_update_period=500)
    config = TrainConfig(env="CartPole-v1", agent=agent, env_steps=100)
    assert decode(encode(config)) == config
    RunDirectory.create(tmp_path / "run", config)
    assert RunDirectory.open(tmp_path / "run").config == config


def test_another_mode_drops_what_the_preset_says_about_its_own() -> None:
    config = make_config("CartPole-v1", "rainbow_lite", replay="none")
    assert config.agent == dataclasses.replace(
        AgentConfig(), replay="none", dueling=True, layer_norm=True, hidden_sizes=(64, 64), exploration_env_steps=10_000
    )
    assert make_config("gymnax:Breakout-MinAtar", "pqn", learning_rate_schedule="constant").agent.replay == "none"
    agent = make_config("CartPole-v1", "rainbow_lite", "actor-learner").agent
    assert agent.exploration_env_steps == AgentConfig().exploration_env_steps


@pytest.mark.parametrize("topology", ["gossip", "parameter-server", "all-reduce"])
def test_topologies_without_sequences_name_those_that_have_them(topology: str) -> None:
    message = f"topology {topology} and replay prioritised, got 'lstm'; choose topology fused or overlapped or actor-"
    with pytest.raises(ConfigError, match=message):
        make_config("CartPole-v1", "r2d2", topology)


def test_a_topology_that_can_not_train_a_memory_names_those_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in TOPOLOGIES.values():
        monkeypatch.setattr(kind, "replays_with_memory", ("none",) if kind is TOPOLOGIES["fused"] else ())
    assert make_config("CartPole-v1", "pqn", memory="gru", memory_size=16).agent.memory_size == 16
    message = "memory must be none with topology gossip and replay none, got 'gru'; choose topology fused, or memory"
    with pytest.raises(ConfigError, match=message):
        make_config("CartPole-v1", "pqn", "gossip", memory="gru")
    for kind in TOPOLOGIES.values():
        monkeypatch.setattr(kind, "replays_with_memory", ())
    with pytest.raises(ConfigError, match="with topology fused and replay uniform, got 'lstm'; choose memory none"):
        make_config("CartPole-v1", "dqn", memory="lstm")


def test_minibatches_of_a_recurrent_agent_take_whole_lanes() -> None:
    make_config("CartPole-v1", "pqn_rnn", num_envs=12, num_minibatches=6)
    message = "because a minibatch takes whole lanes, got num_minibatches=8, 12 / 1 = 12; try 6"
    with pytest.raises(ConfigError, match=message):
        make_config("CartPole-v1", "pqn_rnn", num_envs=12, num_minibatches=8)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_says_what_its_mode_ignores(preset: str) -> None:
    for settings in (PRESETS[preset].settings, *(own for (name, _), own in TUNED.items() if name == preset)):
        whole = {**PRESETS[preset].settings, **settings}
        topology = TOPOLOGIES[PRESETS[preset].topology or "fused"]
        assert not set(settings_without_effect(whole, topology)) & set(settings)


def test_a_run_that_would_not_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got warmup_env_steps=50000, env_steps=20000; try warmup_env_steps=2000, or"):
        make_config("CartPole-v1", "dqn", warmup_env_steps=50_000, env_steps=20_000)
    with pytest.raises(ConfigError, match="warmup_env_steps must be below env_steps"):
        make_config("CartPole-v1", "dqn", warmup_env_steps=20_000, env_steps=20_000, exploration_env_steps=50_000)
    with pytest.raises(ConfigError, match="env_steps_per_learner_step must leave time for a learner step"):
        make_config("CartPole-v1", "dqn", env_steps_per_learner_step=1e6)
    with pytest.raises(ConfigError, match="warmup_env_steps must be below exploration_env_steps"):
        make_config("CartPole-v1", "dqn", warmup_env_steps=50_000, exploration_env_steps=50_000)
    agent = AgentConfig(warmup_env_steps=5_000)
    config = TrainConfig(env="CartPole-v1", agent=agent, env_steps=5_000, run_dir=str(tmp_path / "run"))
    assert decode(encode(config)) == config
    with pytest.raises(ConfigError, match="warmup_env_steps must be below env_steps"):
        qfleet.train(config)
    assert not list(tmp_path.iterdir())


def test_a_rate_of_target_updates_below_1_needs_its_period_said_too() -> None:
    for env in ("CartPole-v1", "gymnax:SpaceInvaders-MinAtar"):  # with and without a period of the preset's own
        with pytest.raises(ConfigError, match="target_update_period must be given .*; give target_update_period=1"):
            make_config(env, "double_dqn", target_update_rate=0.005)
        for period in (1, 500):
            agent = make_config(env, "double_dqn", target_update_rate=0.005, target_update_period=period).agent
            assert (agent.target_update_rate, agent.target_update_period) == (0.005, period)
