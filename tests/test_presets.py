"""Presets: which settings replace which, and that every combination on offer is valid."""

import dataclasses

import gymnasium
import jax
import pytest

from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError, FusedConfig, TrainConfig
from qfleet.envs.registry import list_envs, make_env
from qfleet.networks import make_network
from qfleet.presets import PRESETS, TUNED, make_config, make_explained_config


def test_explicit_settings_win_over_tuned_ones_and_those_over_the_presets() -> None:
    tuned = TUNED["rainbow_lite", "CartPole-v1"]
    config = make_config("CartPole-v1", "rainbow_lite", n_step=5, num_envs=8, env_steps=12_345)
    assert (config.agent.n_step, config.topology.num_envs, config.env_steps) == (5, 8, 12_345)
    assert config.agent.hidden_sizes == tuned["hidden_sizes"] != AgentConfig().hidden_sizes
    assert config.agent.dueling and not AgentConfig().dueling
    assert config.agent.discount == AgentConfig().discount
    assert (config.env, config.preset) == ("CartPole-v1", "rainbow_lite")


def test_an_environment_without_tuned_settings_gets_the_presets_own() -> None:
    config = make_config("gymnax:Catch-bsuite", "pqn")
    assert config.agent == AgentConfig(**PRESETS["pqn"].settings)
    assert config.topology == FusedConfig()
    assert config == TrainConfig(env="gymnax:Catch-bsuite", preset="pqn", agent=config.agent)


@pytest.mark.parametrize(
    ("env", "preset", "exploration"),
    [
        ("CartPole-v1", "pqn", 0.0),
        ("gymnax:SpaceInvaders-MinAtar", "double_dqn", 0.001),
        ("gymnax:Breakout-MinAtar", "pqn", 0.001),
        ("ale:Pong", "atari_dqn", 0.05),
        ("ale:Pong", "atari_pqn", 0.001),
        ("ale:Pong", "ape_x", 0.001),
        ("ale:Pong", "pqn", 0.001),
        ("ale:Pong", "rainbow_lite", 0.001),
        ("ale:Pong", "rainbow", 0.001),
        ("ale:Pong", "iqn", 0.001),
        ("CartPole-v1", "ape_x", 0.0),
    ],
)
def test_evaluations_of_deterministic_games_take_the_random_actions_of_published_ones(
    env: str, preset: str, exploration: float
) -> None:
    assert make_config(env, preset).eval_exploration == exploration
    assert make_config(env, preset, eval_exploration=0.25).eval_exploration == 0.25


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if not preset.for_pixels])
@pytest.mark.parametrize("env", sorted({env for _, env in TUNED} | {"gymnax:SpaceInvaders-MinAtar"}))
def test_every_preset_can_be_made_for_every_environment(preset: str, env: str) -> None:
    config = make_config(env, preset)
    for name, value in TUNED.get((preset, env), {}).items():
        assert value in [getattr(part, name, None) for part in (config, config.agent, config.topology)]
    network = make_network(make_env(env).spec, config.agent)
    assert jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.for_pixels])
@pytest.mark.parametrize("env", ["CartPole-v1", "gymnax:Breakout-MinAtar", "CliffWalking-v1"])
def test_a_preset_for_atari_is_refused_elsewhere_and_names_one_that_suits(preset: str, env: str) -> None:
    with pytest.raises(
        ConfigError, match=f"env must show pixels .* {preset}, got {env}.*; choose preset (.+), whose"
    ) as e:
        make_config(env, preset)
    other = str(e.value).split("choose preset ")[1].split(",")[0]
    assert make_config(env, other).preset == other


def test_a_preset_for_atari_is_for_other_environments_with_such_pixels_too() -> None:
    assert make_config("CarRacing-v3", "atari_dqn", env_options={"continuous": False}).preset == "atari_dqn"


@pytest.mark.parametrize("name", ["double_dqn", "rainbow", "iqn", "btr"])
def test_on_atari_a_preset_is_the_published_one_and_has_a_name_that_says_so(name: str) -> None:
    ours, published = make_config("ale:Pong", name), make_config("ale:Pong", f"atari_{name}")
    assert dataclasses.replace(ours, preset=published.preset) == published
    assert ours.agent.replay_capacity >= 1_000_000 > make_config("CartPole-v1", name).agent.replay_capacity


@pytest.mark.parametrize("preset", ["ape_x", "gorila"])
def test_a_preset_says_where_it_leaves_the_published_sizes(preset: str) -> None:
    assert "published ones are for Atari" in make_explained_config("CartPole-v1", preset)[1]
    assert make_explained_config("ale:Pong", preset)[1] == ""


def test_tuned_settings_are_for_presets_and_environments_that_exist() -> None:
    assert {preset for preset, _ in TUNED} <= set(PRESETS)
    assert {env for _, env in TUNED} <= {name for name, _ in list_envs()} | set(gymnasium.registry)


def test_an_unknown_preset_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match="got 'double_dqm'. Did you mean double_dqn"):
        make_config("CartPole-v1", "double_dqm")


@pytest.mark.parametrize(("name", "hint"), [("num_env", "Did you mean num_envs"), ("learning_rat", "learning_rate")])
def test_an_unknown_setting_is_refused_with_the_nearest_names(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r}.*{hint}"):
        make_config("CartPole-v1", **{name: 1})


@pytest.mark.parametrize("name", ["agent"])
def test_a_whole_part_is_not_a_setting(name: str) -> None:
    with pytest.raises(ConfigError, match="settings must be fields of a config"):
        make_config("CartPole-v1", **{name: AgentConfig()})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_envs": 0},
        {"num_envs": 10**12},
        {"num_minibatches": 7},
        {"preset": "dqn", "replay_capacity": 10},
        {"preset": "dqn", "replay_capacity": 10**12},
        {"env_steps": -1},
        {"discount": 1.5},
        {"replay": "uniforme"},
        {"hidden_sizes": (0,)},
        {"checkpoint_period_seconds": float("nan")},
    ],
    ids=str,
)
def test_impossible_sizes_and_values_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="must .*got"):
        make_config("CartPole-v1", **settings)


@pytest.mark.parametrize("topology", TOPOLOGIES.values())
def test_every_setting_belongs_to_one_config_only(topology: type) -> None:
    names = [field.name for kind in (AgentConfig, topology, TrainConfig) for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_the_topology_suits_the_environment_and_brings_its_settings() -> None:
    assert make_config("CartPole-v1").topology.name == "fused"
    assert make_config("gymnax:Breakout-MinAtar").topology.name == "fused"
    config = make_config("LunarLander-v3", lock_step=True)
    assert config.topology.name == "overlapped" and config.topology.lock_step
    assert make_config("gym:CartPole-v1").topology.name == "overlapped"
    for setting in ("lock_step", "profile"):
        with pytest.raises(ConfigError, match=f"{setting} must come with topology overlapped.* got topology fused"):
            make_config("CartPole-v1", **{setting: True})
    with pytest.raises(ConfigError, match="one of fused, .*, parameter-server, got .fussed'. Did you mean fused"):
        make_config("CartPole-v1", topology="fussed")


@pytest.mark.parametrize(
    ("topology", "settings"),
    [
        ("gossip", {"num_env_workers": 2}),
        ("all-reduce", {"max_failures": 3}),
        ("all-reduce", {"lock_step": True}),
        ("actor-learner", {"step_timeout_seconds": 5}),
    ],
)
def test_how_environments_are_stepped_is_refused_where_they_are_part_of_the_program(
    topology: str, settings: dict
) -> None:
    preset = "double_dqn" if topology == "actor-learner" else "pqn"
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be left out in CartPole-v1, which is written"):
        make_config("CartPole-v1", preset, topology, **settings)
    assert make_config("gym:CartPole-v1", preset, topology, **settings).env == "gym:CartPole-v1"


def test_an_empty_topology_is_none_of_them() -> None:
    with pytest.raises(ConfigError, match="topology must be one of fused, .* got ''"):
        make_config("CartPole-v1", topology="")
