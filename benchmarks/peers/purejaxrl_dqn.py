"""Environment steps/s of purejaxrl's dqn.py, with its own settings; runs in the peers' environment.

    python purejaxrl_dqn.py CHECKOUT

purejaxrl isn't packaged, so CHECKOUT is a folder with its repository. It imports a logger that isn't needed here.
"""

import importlib
import sys
import types
from typing import Any

import jax
from speed import print_speed

sys.modules["wandb"] = types.ModuleType("wandb")
vars(jax).setdefault("tree_map", jax.tree.map)  # purejaxrl was written for a JAX that had this name
sys.path.insert(0, sys.argv[1])

SETTINGS: dict[str, Any] = {
    "NUM_ENVS": 10,
    "BUFFER_SIZE": 10_000,
    "BUFFER_BATCH_SIZE": 128,
    "TOTAL_TIMESTEPS": 500_000,
    "EPSILON_START": 1.0,
    "EPSILON_FINISH": 0.05,
    "EPSILON_ANNEAL_TIME": 250_000,
    "TARGET_UPDATE_INTERVAL": 500,
    "LR": 2.5e-4,
    "LEARNING_STARTS": 10_000,
    "TRAINING_INTERVAL": 10,
    "LR_LINEAR_DECAY": False,
    "GAMMA": 0.99,
    "TAU": 1.0,
    "ENV_NAME": "CartPole-v1",
}

print_speed(importlib.import_module("purejaxrl.dqn").make_train(SETTINGS), SETTINGS["TOTAL_TIMESTEPS"])
