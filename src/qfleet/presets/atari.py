"""The published settings for Atari of presets whose own settings are for small problems."""

from collections.abc import Mapping
from typing import Any

ATARI_DQN: Mapping[str, Any] = {
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

# Hessel et al. 2018, table 1, without what they explore by.
_ATARI_RAINBOW: Mapping[str, Any] = {
    **{name: value for name, value in ATARI_DQN.items() if not name.startswith(("max_gradient", "exploration"))},
    "warmup_env_steps": 20_000,
    "target_update_period": 2_000,
    "optimiser": "adam",
    "optimiser_options": {"eps": 1.5e-4},
    "learning_rate": 6.25e-5,
    "eval_exploration": 0.001,
}

# Bellemare et al. 2017, section 5, and Dabney et al. 2018, both papers, share the settings of Mnih et al. 2015, with
# Adam and an epsilon of 0.01.
_ATARI_DISTRIBUTION: Mapping[str, Any] = {
    **ATARI_DQN,
    "optimiser": "adam",
    "exploration_end": 0.01,
    "eval_exploration": 0.001,
}

# Kapturowski et al. 2019, table 2 and section 2.3. They have 256 actors, and don't set a ratio of learner steps. With
# ours, each row is learned from 8 times. The norm of gradients is that of Ape-X, on which R2D2 is built.
_ATARI_R2D2: Mapping[str, Any] = {
    "torso": "nature",
    "memory_size": 512,
    "hidden_sizes": (512,),
    "burn_in": 40,
    "sequence_length": 80,
    "batch_size": 64,
    "replay_capacity": 4_000_000,
    "warmup_env_steps": 50_000,
    "env_steps_per_learner_step": 640.0,
    "target_update_period": 2_500,
    "optimiser": "adam",
    "optimiser_options": {"eps": 1e-3},
    "learning_rate": 1e-4,
    "max_gradient_norm": 40.0,
    "exploration_end": 0.01,
    "exploration_env_steps": 1_000_000,
    "env_steps": 50_000_000,
    "eval_period_env_steps": 500_000,
    "eval_episodes": 16,
    "eval_exploration": 0.001,
    "checkpoint_period_seconds": 600.0,
}

ON_ATARI: dict[str, Mapping[str, Any]] = {
    "dqn": ATARI_DQN,
    "double_dqn": ATARI_DQN,  # van Hasselt et al. 2016 compare both with the same settings
    "c51": {**_ATARI_DISTRIBUTION, "optimiser_options": {"eps": 0.01 / 32}, "learning_rate": 2.5e-4},
    "qr_dqn": {
        **_ATARI_DISTRIBUTION,
        "optimiser_options": {"eps": 0.01 / 32},
        "learning_rate": 5e-5,
        "num_quantiles": 200,
    },
    "iqn": {
        **_ATARI_DISTRIBUTION,
        "optimiser_options": {"eps": 0.01 / 32},
        "learning_rate": 5e-5,
        "num_quantiles": 64,
    },
    # Vieillard et al. 2020, appendix B.1, which has the settings of Dopamine's DQN, with Adam.
    "munchausen": {**_ATARI_DISTRIBUTION, "optimiser_options": {"eps": 0.01 / 32}, "learning_rate": 5e-5},
    # Epsilon decays in place of their noisy layers, as in Dopamine's Rainbow.
    "rainbow_lite": {**_ATARI_RAINBOW, "exploration_end": 0.01, "exploration_env_steps": 250_000},
    "rainbow": _ATARI_RAINBOW,
    "r2d2": _ATARI_R2D2,
    # Clark et al. 2024, appendix with the hyperparameters.
    "btr": {
        **_ATARI_RAINBOW,
        "torso": "impala",
        "torso_width": 2,
        "spectral_norm": True,
        "adaptive_pooling": 6,
        "num_envs": 64,
        "replay_capacity": 2**20,
        "warmup_env_steps": 200_000,
        "batch_size": 256,
        "env_steps_per_learner_step": 64.0,
        "target_update_period": 500,
        "optimiser_options": {"eps": 0.005 / 256},
        "learning_rate": 1e-4,
        "max_gradient_norm": 10.0,
        "exploration_env_steps": 2_000_000,
    },
}
"""The published settings of presets whose own are for small problems. They replace the preset's there."""
