"""Settings tuned for single environments."""

from collections.abc import Mapping
from typing import Any

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
