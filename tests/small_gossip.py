"""Settings of small runs with peers that gossip."""

from typing import Any

import qfleet
from qfleet.config import TrainConfig


def config_of(preset: str = "dqn", env: str = "CartPole-v1", **settings: Any) -> TrainConfig:
    """A small run of two peers."""
    defaults = {
        "num_processes": 2, "num_envs": 4, "hidden_sizes": (16,), "env_steps": 4_096, "eval_period_env_steps": 2_048,
        "eval_episodes": 8, "gossip_period_learner_steps": 32,
    }  # fmt: skip
    if preset != "pqn":
        defaults |= {"replay_capacity": 2_048, "warmup_env_steps": 128, "batch_size": 16}
        defaults |= {"env_steps_per_learner_step": 4.0}
    return qfleet.make_config(env, preset, "gossip", **{**defaults, **settings})
