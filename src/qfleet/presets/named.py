"""Named combinations of options, and what they become on Atari and elsewhere."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qfleet.presets.atari import ATARI_DQN, ON_ATARI


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A well-known combination of options."""

    summary: str
    source: str
    settings: Mapping[str, Any]
    """Fields of `AgentConfig`, `TrainConfig` and every topology's config that differ from their defaults."""
    topology: str | None = None
    """Topology that it runs in by default; None means the one that suits the environment."""
    for_pixels: bool = False
    """Whether it is refused in environments that don't show pixels of Atari's size."""


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
    "c51": Preset(
        summary="dqn, with a probability for each of 51 returns in place of their mean",
        source="Bellemare et al. 2017, arXiv 1707.06887",
        settings={"head": "c51"},
    ),
    "qr_dqn": Preset(
        summary="dqn, with 64 quantiles of the return in place of its mean",
        source="Dabney et al. 2018, arXiv 1710.10044; they have 200 quantiles",
        settings={"head": "qr"},
    ),
    "iqn": Preset(
        summary="dqn, with any quantile of the return in place of its mean",
        source="Dabney et al. 2018, arXiv 1806.06923; on Atari with their 64 fractions, elsewhere with 8",
        settings={"head": "iqn", "num_quantiles": 8},
    ),
    "munchausen": Preset(
        summary="dqn, with the log-probability of the action in the reward, and a softmax policy as the target",
        source="Vieillard et al. 2020, arXiv 2007.14430; add --head iqn for their M-IQN",
        settings={"munchausen": True},
    ),
    "rainbow": Preset(
        summary="c51, double, dueling, 3-step returns, prioritised replay, noisy layers",
        source="Hessel et al. 2018, arXiv 1710.02298",
        settings={
            "head": "c51",
            "double": True,
            "dueling": True,
            "noisy": True,
            "exploration_start": 0.0,
            "exploration_end": 0.0,
            "actor_epsilon_base": 0.0,
            "n_step": 3,
            "replay": "prioritised",
            "priority_exponent": 0.5,
            "importance_exponent_env_steps": None,
            "importance_normalisation": "batch_max",
        },
    ),
    "btr": Preset(
        summary="iqn, munchausen, dueling, 3-step returns, prioritised replay, noisy layers; on Atari a residual torso",
        source="Clark et al. 2024, arXiv 2411.03820; epsilon stays at its end, where they switch it off half-way",
        settings={
            "head": "iqn",
            "num_quantiles": 8,
            "num_acting_quantiles": 8,
            "munchausen": True,
            "dueling": True,
            "noisy": True,
            "discount": 0.997,
            "n_step": 3,
            "replay": "prioritised",
            "priority_exponent": 0.2,
            "importance_exponent_start": 0.45,
            "importance_exponent_env_steps": None,
            "importance_normalisation": "batch_max",
            "exploration_end": 0.01,
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
    "r2d2": Preset(
        summary="an LSTM that learns from sequences in a prioritised replay: double, dueling, 5-step, rescaled values",
        source=(
            "Kapturowski et al. 2019, Recurrent Experience Replay in Distributed Reinforcement Learning, without the "
            "last action and reward as inputs; new sequences enter at the greatest priority; our sizes off Atari"
        ),
        settings={
            "memory": "lstm",
            "memory_size": 64,
            "hidden_sizes": (64, 64),
            "double": True,
            "dueling": True,
            "n_step": 5,
            "value_rescaling": True,
            "loss": "squared",
            "discount": 0.997,
            "replay": "prioritised",
            "priority_exponent": 0.9,
            "importance_exponent_start": 0.6,
            "importance_exponent_env_steps": 10**15,  # the exponent practically stays at its start
            "burn_in": 10,
            "sequence_length": 40,
            "num_envs": 16,
            "batch_size": 32,
            "env_steps_per_learner_step": 32.0,
            "target_update_period": 100,
            "exploration_end": 0.02,
        },
    ),
    "pqn_rnn": Preset(
        summary="pqn, with a GRU that remembers the episode",
        source=(
            "Gallici et al. 2024, arXiv 2407.04811, with purejaxql's settings for MemoryChain, but half their "
            "units, no last action as an input, and returns that are computed once a rollout"
        ),
        settings={
            "replay": "none",
            "memory": "gru",
            "memory_size": 128,
            "layer_norm": True,
            "loss": "squared",
            "optimiser": "radam",
            "hidden_sizes": (128, 128),
            "num_envs": 32,
            "rollout_length": 128,
            "trace_decay": 0.95,
            "num_epochs": 4,
            "num_minibatches": 16,
            "exploration_end": 0.01,
            "exploration_fraction": 0.1,
        },
    ),
    "atari_dqn": Preset(
        summary="dqn as published for Atari: one update of 32 every 4 agent steps, a replay of a million frames",
        source="Mnih et al. 2015, Nature 518, extended data table 1; RMSProp's epsilon is adapted to mean gradients",
        settings=ATARI_DQN,
        for_pixels=True,
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
    "gorila": Preset(
        summary="many workers that act and learn, each with its own replay, and a server that applies their gradients",
        source="Nair et al. 2015, arXiv 1507.04296; number of processes, replay and learning rate are ours",
        topology="parameter-server",
        settings={
            **{name: value for name, value in ATARI_DQN.items() if name not in ("num_envs", "optimiser_options")},
            "optimiser": "adagrad",
            "learning_rate": 1e-3,
            "target_update_period": 60_000,
            "exploration_env_steps": 4_000_000,  # their million updates, at four steps each
        },
    ),
    "atari_pqn": Preset(
        summary="pqn as published for Atari: 128 lanes, rollouts of 32",
        source="Gallici et al. 2024, arXiv 2407.04811, appendix",
        for_pixels=True,
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
    "gorila": {
        "torso": "auto",
        "hidden_sizes": (128, 128),
        "batch_size": 64,
        "replay_capacity": 100_000,
        "warmup_env_steps": 1_000,
        "env_steps_per_learner_step": 8.0,
        "optimiser": "adam",
        "learning_rate": 5e-4,
        "target_update_period": 500,
        "exploration_end": 0.05,
        "exploration_env_steps": 25_000,
        "max_gradient_norm": 10.0,
        "env_steps": 500_000,
        "eval_period_env_steps": 10_000,
        "eval_episodes": 20,
        "eval_exploration": 0.0,
        "checkpoint_period_seconds": 60.0,
    },
}
"""Our settings of presets whose own are the published ones for Atari. They replace the preset's elsewhere."""

PRESETS |= {
    f"atari_{name}": dataclasses.replace(
        PRESETS[name],
        summary=f"{name} as published for Atari; on Atari, {name} is the same",
        settings={**PRESETS[name].settings, **ON_ATARI[name]},
        for_pixels=True,
    )
    for name in ("double_dqn", "rainbow", "iqn", "btr")
}
