"""Checks of a new run. A run's folder may hold a config that breaks them, because earlier versions took it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qfleet.config.agent import SHARES, AgentConfig
from qfleet.config.errors import ConfigError
from qfleet.config.own_parts import OWN_PARTS, is_own_name
from qfleet.config.topologies import TOPOLOGIES
from qfleet.config.topology import TopologyConfig
from qfleet.config.train import TrainConfig
from qfleet.config.values import show


class _Mode(NamedTuple):
    """Values of one setting with which other settings have no effect."""

    setting: str
    values: tuple[str | bool | float, ...]
    without_effect: tuple[str, ...]
    remedy: str


_MODES = (
    _Mode(
        "replay", ("none",),
        (
            "double", "n_step", "batch_size", "replay_capacity", "warmup_env_steps", "env_steps_per_learner_step",
            "target_update_period", "target_update_rate", "munchausen", "value_rescaling", "burn_in",
            "sequence_length", "sequence_period", "target",
        ),
        "choose replay uniform or prioritised; without replay, trace_decay does the work of n_step",
    ),
    _Mode(
        "replay", ("uniform", "prioritised"), ("rollout_length", "trace_decay", "num_epochs", "num_minibatches"),
        "choose replay none",
    ),
    _Mode(
        "replay", ("uniform", "none"),
        (
            "priority_exponent", "importance_exponent_start", "importance_exponent_env_steps",
            "importance_exponent_fraction", "importance_normalisation", "priority_max_share",
        ),
        "choose replay prioritised",
    ),
    _Mode("head", ("c51", "qr", "iqn", "hl_gauss"), ("loss",), "choose head scalar"),
    _Mode(
        "head", ("scalar", "qr", "iqn"), ("num_atoms", "value_min", "value_max"), "choose head c51 or hl_gauss"
    ),
    _Mode("head", ("scalar", "c51", "qr", "iqn"), ("hl_gauss_smoothing",), "choose head hl_gauss"),
    _Mode("head", ("scalar", "c51", "hl_gauss"), ("num_quantiles",), "choose head qr or iqn"),
    _Mode("head", ("scalar", "c51", "qr", "hl_gauss"), ("num_acting_quantiles", "num_cosines"), "choose head iqn"),
    _Mode("head", ("c51", "hl_gauss"), ("huber_delta",), "choose another head"),
    _Mode("munchausen", (True,), ("double",), "leave out munchausen, whose target doesn't choose an action"),
    _Mode(
        "munchausen", (False,), ("munchausen_temperature", "munchausen_weight", "munchausen_clip"),
        "choose munchausen too",
    ),
    _Mode("noisy", (False,), ("noisy_std",), "choose noisy too"),
    _Mode(
        "memory", ("none",),
        ("memory_size", "burn_in", "sequence_length", "sequence_period", "priority_max_share"),
        "choose memory lstm or gru",
    ),
    _Mode(
        "exploration", ("softmax",), ("exploration_max_duration", "exploration_duration_exponent"),
        "choose exploration epsilon_greedy",
    ),
    _Mode(
        "exploration_start", (0.0,), ("exploration_max_duration", "exploration_duration_exponent"),
        "choose an exploration_start above 0",
    ),
    _Mode(
        "exploration_max_duration", (1,), ("exploration_duration_exponent",),
        "choose an exploration_max_duration above 1, such as 10000",
    ),
    _Mode("loss", ("squared",), ("huber_delta",), "choose loss huber"),
    _Mode(
        "learning_rate_schedule", ("constant",),
        ("learning_rate_end_fraction", "learning_rate_learner_steps", "learning_rate_fraction"),
        "choose another learning_rate_schedule, such as linear",
    ),
    _Mode("torso", ("mlp",), ("convolution",), "choose a torso with convolutions"),
    _Mode("torso", ("auto", "mlp"), ("torso_width",), "name a torso with convolutions, such as impala"),
    _Mode(
        "torso", ("auto", "mlp", "minatar", "nature", "hadamax"), ("spectral_norm", "adaptive_pooling"),
        "choose torso impala",
    ),
)  # fmt: skip


def settings_without_effect(settings: Mapping[str, Any], topology: type[TopologyConfig]) -> dict[str, str]:
    """Returns the fields of `AgentConfig` that have no effect in a run, each with the reason and the remedy.

    Args:
      settings: values of fields of `AgentConfig`; those left out have their defaults.
      topology: class of the topology's config.
    """
    modes = vars(AgentConfig()) | dict(settings)
    found = {name: f"come with {reason}" for name, reason in topology.settings_without_effect.items()}
    for mode in _MODES:
        if modes[mode.setting] in mode.values:
            reason = f"be left out with {mode.setting} {modes[mode.setting]}, where it has no effect"
            found |= dict.fromkeys(mode.without_effect, f"{reason}, got {{value}}; leave it out, or {mode.remedy}")
    if modes["target"] is not None:
        reason = "be left out with target {}, which takes its place, got {{value}}; leave one of the two out"
        found |= dict.fromkeys(("double", "munchausen"), reason.format(modes["target"]))
    if modes["memory"] != "none" or modes["value_rescaling"]:
        other = "value_rescaling" if modes["value_rescaling"] else f"memory {modes['memory']}"
        words = f"be left out with {other}, which doesn't work with it yet, got {{value}}; leave one of the two out"
        found |= dict.fromkeys(("normalise_observations", "normalise_rewards", "target"), words)
    if not any(is_own_name(modes[name]) for name in OWN_PARTS):
        found["own_options"] = "be left out without a part of your own (MODULE:NAME), got {value}; leave it out"
    for share, length in SHARES.items():
        if modes[share] is not None:
            found[length] = f"be left out with {share}, which takes its place, got {{value}}; give one of the two"
    return found


def check_new_run(config: TrainConfig) -> None:
    """Checks that a new run learns, and that each of its settings has an effect or its default.

    Raises:
      ConfigError: if it doesn't.
    """
    agent, defaults = vars(config.agent), vars(AgentConfig())
    for name, words in settings_without_effect(agent, type(config.topology)).items():
        if agent[name] != defaults[name]:
            raise ConfigError(f"{name} must {words.replace('{value}', show(agent[name]))}")
    if config.agent.memory != "none":
        _check_memory(config)
    if config.agent.replay != "none":
        _check_warmup(config.with_schedule_lengths())


def _check_memory(config: TrainConfig) -> None:
    replay, memory = config.agent.replay, config.agent.memory
    if replay in config.topology.replays_with_memory:
        return
    found = [name for name, kind in TOPOLOGIES.items() if replay in kind.replays_with_memory]
    remedy = f"choose topology {' or '.join(found)}, or memory none" if found else "choose memory none"
    raise ConfigError(
        f"memory must be none with topology {config.topology.name} and replay {replay}, got {memory!r}; {remedy}"
    )


def _check_warmup(config: TrainConfig) -> None:
    agent, warmup = config.agent, config.agent.warmup_env_steps
    if warmup >= config.env_steps:
        raise ConfigError(
            f"warmup_env_steps must be below env_steps, or nothing is learned, got warmup_env_steps={warmup}, "
            f"env_steps={config.env_steps}; try warmup_env_steps={config.env_steps // 10}, or more env_steps"
        )
    if warmup + agent.env_steps_per_learner_step > config.env_steps:
        raise ConfigError(
            f"env_steps_per_learner_step must leave time for a learner step after the warm-up, got "
            f"env_steps_per_learner_step={agent.env_steps_per_learner_step:g}, warmup_env_steps={warmup}, "
            f"env_steps={config.env_steps}; give more env_steps"
        )
    decays = "exploration_env_steps" not in config.topology.settings_without_effect
    if decays and agent.exploration_end < agent.exploration_start and warmup >= agent.exploration_env_steps:
        raise ConfigError(
            f"warmup_env_steps must be below exploration_env_steps, or the exploration has decayed before anything is "
            f"learned, got warmup_env_steps={warmup}, exploration_env_steps={agent.exploration_env_steps}; "
            f"try exploration_env_steps={10 * warmup}"
        )
