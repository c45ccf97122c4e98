"""Named combinations of options, and settings tuned for single environments."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError, TrainConfig, suggest
from qfleet.config.new_run import check_new_run, settings_without_effect
from qfleet.config.topologies import check_suits, check_topology_name, suits, without_alias
from qfleet.config.values import to_plain
from qfleet.defaults import Choice, accepts, choose, is_atari, shortened
from qfleet.envs.factory import name_of_factory
from qfleet.envs.registry import default_topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A well-known combination of options."""

    summary: str
    source: str
    settings: Mapping[str, Any]
    """Fields of `AgentConfig`, `TrainConfig` and every topology's config that differ from their defaults."""
    topology: str | None = None
    """Topology that it runs in by default; None means the one that suits the environment."""


_ATARI_DQN: Mapping[str, Any] = {
    "torso": "nature",
    "hidden_sizes": (512,),
    "num_envs": 8,
    "replay_capacity": 1_000_000,
    "warmup_env_steps": 50_000,
    "batch_size": 32,
    "env_steps_per_learner_step": 4.0,
    # Their table counts learner steps, but their program counts agent steps, as everybody has since: 10,000.
    "target_update_period": 2_500,
    "optimiser": "rmsprop",
    "optimiser_options": {"decay": 0.95, "eps": 0.01 / 32**2, "centered": 1.0},
    "learning_rate": 2.5e-4,
    "max_gradient_norm": None,
    "exploration_end": 0.1,
    "exploration_env_steps": 1_000_000,
    "env_steps": 50_000_000,
    "eval_period_env_steps": 250_000,
    "eval_episodes": 16,
    "eval_exploration": 0.05,
    "checkpoint_period_seconds": 600.0,
}

PRESETS: dict[str, Preset] = {
    "dqn": Preset(
        summary="Q-network, uniform replay, target network, epsilon-greedy",
        source="Mnih et al. 2015, Nature 518",
        settings={},
    ),
    "double_dqn": Preset(
        summary="dqn, with the online network picking the bootstrap action",
        source="van Hasselt et al. 2016, arXiv 1509.06461",
        settings={"double": True},
    ),
    "rainbow_lite": Preset(
        summary="double, dueling, 3-step returns, prioritised replay",
        source="Hessel et al. 2018, arXiv 1710.02298, without its distributional and noisy parts",
        settings={
            "double": True,
            "dueling": True,
            "n_step": 3,
            "replay": "prioritised",
            "priority_exponent": 0.5,
            "importance_exponent_env_steps": None,
        },
    ),
    "pqn": Preset(
        summary="Q(lambda) with layer normalisation; no replay, no target network; the fastest in many lanes",
        source="Gallici et al. 2024, arXiv 2407.04811",
        settings={
            "replay": "none",
            "layer_norm": True,
            "loss": "squared",
            "optimiser": "radam",
            "hidden_sizes": (64, 64),
            "exploration_env_steps": 50_000,
        },
    ),
    "atari_dqn": Preset(
        summary="dqn as published for Atari: one update of 32 every 4 agent steps, a replay of a million frames",
        source="Mnih et al. 2015, Nature 518, extended data table 1; RMSProp's epsilon is adapted to mean gradients",
        settings=_ATARI_DQN,
    ),
    "ape_x": Preset(
        summary="many actors, each with its own epsilon, a prioritised replay, and one learner",
        source="Horgan et al. 2018, arXiv 1803.00933, section 4.1 and appendix C",
        topology="actor-learner",
        settings={
            "double": True,
            "dueling": True,
            "n_step": 3,
            "replay": "prioritised",
            "hidden_sizes": (512,),
            "batch_size": 512,
            "replay_capacity": 2_000_000,
            "warmup_env_steps": 50_000,
            # Ours. They don't set a ratio: with 360 actors they report 12,500 transitions and 19 learner steps per
            # second, one step per 660. Fewer actors bring less at the same speed of the learner. With 64, each
            # transition is learned from 8 times, as in DQN.
            "env_steps_per_learner_step": 64.0,
            "target_update_period": 2_500,
            "priority_exponent": 0.6,
            "importance_exponent_start": 0.4,
            "importance_exponent_env_steps": 10**15,  # the exponent practically stays at its start
            "loss": "squared",  # their equation of the loss; the norm of 40 is made for its gradients
            "optimiser": "rmsprop",
            "optimiser_options": {"decay": 0.95, "eps": 1.5e-7, "centered": 1.0},
            "learning_rate": 2.5e-4 / 4,
            "max_gradient_norm": 40.0,
            "rows_per_chunk": 50,
            "lanes_per_actor": 1,
            "broadcast_period_learner_steps": 1,
            "actor_epsilon_base": 0.4,
            "actor_epsilon_exponent": 7.0,
            "env_steps": 50_000_000,
            "eval_period_env_steps": 500_000,
            "eval_episodes": 16,
            "checkpoint_period_seconds": 600.0,
        },
    ),
    "atari_pqn": Preset(
        summary="pqn as published for Atari: 128 lanes, rollouts of 32",
        source="Gallici et al. 2024, arXiv 2407.04811, appendix",
        settings={
            "replay": "none",
            "torso": "nature",
            "hidden_sizes": (512,),
            "layer_norm": True,
            "loss": "squared",
            "num_envs": 128,
            "rollout_length": 32,
            "num_minibatches": 32,
            "optimiser": "radam",
            "learning_rate": 2.5e-4,
            "exploration_end": 0.001,
            "exploration_env_steps": 5_000_000,
            "env_steps": 50_000_000,
            "eval_period_env_steps": 500_000,
            "eval_episodes": 16,
            "checkpoint_period_seconds": 600.0,
        },
    ),
}

ON_ATARI: dict[str, Mapping[str, Any]] = {
    "dqn": _ATARI_DQN,
    "double_dqn": _ATARI_DQN,  # van Hasselt et al. 2016 compare both with the same settings
    # Hessel et al. 2018, table 1. Epsilon decays in place of their noisy layers, as in Dopamine's Rainbow.
    "rainbow_lite": {
        **{name: value for name, value in _ATARI_DQN.items() if name != "max_gradient_norm"},
        "warmup_env_steps": 20_000,
        "target_update_period": 2_000,
        "optimiser": "adam",
        "optimiser_options": {"eps": 1.5e-4},
        "learning_rate": 6.25e-5,
        "exploration_end": 0.01,
        "exploration_env_steps": 250_000,
        "eval_exploration": 0.001,
    },
}
"""The published settings of presets whose own are for small problems. They replace the preset's on Atari."""

OFF_ATARI: dict[str, Mapping[str, Any]] = {
    "ape_x": {
        "hidden_sizes": (128, 128),
        "batch_size": 128,
        "replay_capacity": 200_000,
        "warmup_env_steps": 2_000,
        "env_steps_per_learner_step": 8.0,
        "target_update_period": 500,
        "learning_rate": 2.5e-4,
        "broadcast_period_learner_steps": 20,
        "env_steps": 500_000,
        "eval_period_env_steps": 10_000,
        "eval_episodes": 20,
        "checkpoint_period_seconds": 60.0,
    },
}
"""Our settings of presets whose own are the published ones for Atari. They replace the preset's elsewhere."""

# Our own settings, tuned on two CPU cores for the least wall time to a confirmed return; see benchmarks/solve.py.
TUNED: dict[tuple[str, str], Mapping[str, Any]] = {
    ("pqn", "CartPole-v1"): {
        "num_envs": 32,
        "rollout_length": 16,
        "num_epochs": 4,
        "num_minibatches": 4,
        "learning_rate": 2e-3,
        "hidden_sizes": (64, 64),
        "exploration_end": 0.02,
        "exploration_env_steps": 20_000,
        "eval_period_env_steps": 4_096,
    },
    ("double_dqn", "CartPole-v1"): {
        "num_envs": 16,
        "n_step": 3,
        "layer_norm": True,
        "hidden_sizes": (64, 64),
        "batch_size": 64,
        "replay_capacity": 65_536,
        "env_steps_per_learner_step": 4.0,
        "learning_rate": 2e-3,
        "target_update_period": 200,
        "exploration_env_steps": 10_000,
        "eval_period_env_steps": 2_048,
    },
    ("rainbow_lite", "CartPole-v1"): {
        "num_envs": 16,
        "layer_norm": True,
        "hidden_sizes": (64, 64),
        "batch_size": 64,
        "replay_capacity": 16_384,
        "env_steps_per_learner_step": 4.0,
        "target_update_period": 100,
        "exploration_env_steps": 10_000,
        "eval_period_env_steps": 2_048,
    },
    # Ten of ten seeds reach a confirmed -90 on Acrobot (after 0.16M and 0.08M environment steps, medians) and -110 on
    # MountainCar (0.48M and 0.19M), each within 1 to 3 s of training.
    ("pqn", "Acrobot-v1"): {
        "num_envs": 32,
        "rollout_length": 16,
        "num_epochs": 4,
        "num_minibatches": 4,
        "learning_rate": 2e-3,
        "exploration_end": 0.02,
        "exploration_env_steps": 100_000,
        "env_steps": 2_000_000,
        "eval_period_env_steps": 16_384,
    },
    ("pqn", "MountainCar-v0"): {
        "num_envs": 32,
        "rollout_length": 16,
        "num_epochs": 4,
        "num_minibatches": 4,
        "discount": 0.995,
        "trace_decay": 0.9,
        "learning_rate": 2e-3,
        "exploration_end": 0.02,
        "exploration_env_steps": 200_000,
        "env_steps": 2_000_000,
        "eval_period_env_steps": 16_384,
    },
    **{
        ("double_dqn", env): {
            "num_envs": 16,
            "n_step": 5,
            "layer_norm": True,
            "hidden_sizes": (64, 64),
            "batch_size": 64,
            "replay_capacity": 65_536,
            "env_steps_per_learner_step": 4.0,
            "learning_rate": 1e-3,
            "target_update_period": 200,
            "exploration_env_steps": 50_000,
            "env_steps": 1_000_000,
            "eval_period_env_steps": 16_384,
        }
        for env in ("Acrobot-v1", "MountainCar-v0")
    },
    # Three of three seeds reach a confirmed 220, after 0.4M environment steps.
    ("double_dqn", "LunarLander-v3"): {
        "num_envs": 16,
        "n_step": 3,
        "layer_norm": True,
        "batch_size": 128,
        "replay_capacity": 200_000,
        "warmup_env_steps": 5_000,
        "env_steps_per_learner_step": 4.0,
        "learning_rate": 5e-4,
        "exploration_env_steps": 60_000,
        "env_steps": 1_500_000,
        "eval_period_env_steps": 25_000,
    },
    # A dense network is faster than convolutions on a CPU, and no worse. Epsilon stays high because a greedy agent can
    # keep the ball in a loop that never reaches the last bricks, and only a random action breaks it.
    ("pqn", "gymnax:Breakout-MinAtar"): {
        "num_envs": 64,
        "rollout_length": 32,
        "num_minibatches": 8,
        "torso": "mlp",
        "hidden_sizes": (128, 128),
        "exploration_end": 0.05,
        "exploration_env_steps": 1_000_000,
        "learning_rate_schedule": "linear",
        "learning_rate_learner_steps": 50_000,
        "env_steps": 6_000_000,
        "eval_period_env_steps": 500_000,
    },
}


def make_config(
    env: str | Callable[..., Any], preset: str | None = None, topology: str | None = None, **settings: Any
) -> TrainConfig:
    """Returns the config of `preset` for `env`. `settings` replace the tuned ones, and those replace the preset's.

    Args:
      env: name of an environment, or a function or class that makes it, which runs record as `factory:` and its name.
      preset: one of `PRESETS`. By default, preset and settings are chosen for the environment and the topology, see
        `qfleet.defaults`. The environment is made for this, and one outside JAX may be played for a moment.
      topology: one of `qfleet.config.TOPOLOGIES`; by default the one that suits the environment.
      **settings: any field of `AgentConfig`, of the topology's config, or of `TrainConfig`.

    Raises:
      ConfigError: if the preset, the topology or a field is unknown, or a value breaks its rule.
    """
    name = env if isinstance(env, str) else name_of_factory(env)
    return make_explained_config(name, preset, topology, **settings)[0]


def make_explained_config(
    env: str, preset: str | None = None, topology: str | None = None, **settings: Any
) -> tuple[TrainConfig, str]:
    """Returns the config that `make_config` returns, and why its preset was chosen: "" if the caller named it."""
    env, preset, topology = (
        to_plain(kind, value, name)
        for kind, value, name in ((str, env, "env"), (str | None, preset, "preset"), (str | None, topology, "topology"))
    )
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.{suggest(preset, PRESETS)}")
    topology = without_alias(topology, settings.pop("exchange", None))
    options = to_plain(Mapping[str, Any], settings.get("env_options", {}), "env_options")
    topology = topology or (preset and PRESETS[preset].topology) or default_topology(env, **options)
    check_topology_name(topology)
    if preset is None:
        # One that is to be stepped in processes of its own may hang or crash in this one.
        may_play = not settings.get("num_env_workers")
        preset, chosen, reason = _choose(env, topology, options, may_play)
        env_steps = to_plain(int | None, settings.get("env_steps"), "env_steps")
        found = shortened({**PRESETS[preset].settings, **chosen}, env_steps)
    else:
        found, reason = {**PRESETS[preset].settings, **_settings_for(preset, env)}, ""
    merged = {**_starts_from({**_evaluation_of(env), **found}, topology, settings), **settings}
    return _assemble(env, preset, topology, settings, merged), reason


def _settings_for(preset: str, env: str) -> Mapping[str, Any]:
    """Returns the settings that replace those of a preset in this environment."""
    if preset not in (*ON_ATARI, *OFF_ATARI):
        return TUNED.get((preset, env), {})
    return {**(ON_ATARI if is_atari(env) else OFF_ATARI).get(preset, {}), **TUNED.get((preset, env), {})}


def _choose(env: str, topology: str, env_options: Mapping[str, Any], may_play: bool) -> Choice:
    """Returns the preset with settings tuned for this very environment, if there is one, or the one for its family."""
    for (preset, name), tuned in TUNED.items():
        replay = PRESETS[preset].settings.get("replay", "uniform")
        if name == env and accepts(topology, replay=replay):
            return Choice(preset, tuned, f"this preset is tuned for {env}")
    choice = choose(env, topology, env_options, may_play=may_play)
    return choice._replace(settings={**_settings_for(choice.preset, env), **choice.settings})


def _assemble(env: str, preset: str, topology: str, given: Mapping[str, Any], merged: Mapping[str, Any]) -> TrainConfig:
    """Returns the config with the `merged` settings, after checking the names of those that the caller has given."""
    kinds = (AgentConfig, TOPOLOGIES[topology], TrainConfig)
    names = {kind.__name__: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    known = set.union(*names.values()) - {"agent", "topology", "env", "preset"}
    for name in given:
        check_suits(name, topology)
    for name in merged:
        if name not in known:
            raise ConfigError(
                f"settings must be fields of a config with topology {topology}, got {name!r}.{suggest(name, known)}"
            )

    def settings_of(kind: type) -> dict[str, Any]:
        return {name: value for name, value in merged.items() if name in names[kind.__name__]}

    config = TrainConfig(
        env=env,
        preset=preset,
        agent=AgentConfig(**settings_of(AgentConfig)),
        topology=TOPOLOGIES[topology](**settings_of(TOPOLOGIES[topology])),
        **settings_of(TrainConfig),
    )
    check_new_run(config)
    return config


def _evaluation_of(env: str) -> Mapping[str, Any]:
    """Returns how evaluations play in a family of environments: with a few random actions in MinAtar and on Atari.

    These games are deterministic or nearly so. MinAtar's Breakout has two beginnings and its Space Invaders one, so a
    greedy policy plays one or two episodes again and again. One action in a thousand is random, as in evaluations on
    Atari since van Hasselt et al. 2016; `atari_dqn` keeps the 5% of Mnih et al. 2015.
    """
    return {"eval_exploration": 0.001} if env.endswith("-MinAtar") or is_atari(env) else {}


def _starts_from(found: Mapping[str, Any], topology: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preset's and the tuned settings, without those that have no effect beside the given ones."""
    dropped = set(settings_without_effect({**found, **settings}, TOPOLOGIES[topology]))
    rate = to_plain(float, settings.get("target_update_rate", 1.0), "target_update_rate")
    if rate < 1 and found.get("target_update_period") != 1:
        dropped.add("target_update_period")  # it is meant for whole copies, and would make a smaller rate too slow
    return {name: value for name, value in found.items() if name not in dropped and suits(name, topology)}
