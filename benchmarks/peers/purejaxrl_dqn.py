"""Environment steps/s of purejaxrl's dqn.py with its own settings; runs in the peers' environment.

    python purejaxrl_dqn.py CHECKOUT

purejaxrl isn't packaged: CHECKOUT is a folder with its repository. Its logger, which it imports, isn't needed.
"""

import json
import sys
import time
import types
from typing import Any

import jax

sys.modules["wandb"] = types.ModuleType("wandb")
if not hasattr(jax, "tree_map"):
    setattr(jax, "tree_map", jax.tree.map)  # noqa: B010  # it was written for a JAX that had this name
sys.path.insert(0, sys.argv[1])
from purejaxrl.dqn import make_train  # noqa: E402

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

train = jax.jit(make_train(SETTINGS)).lower(jax.random.PRNGKey(0)).compile()
jax.block_until_ready(train(jax.random.PRNGKey(0)))
speeds = []
for repeat in range(3):
    started = time.perf_counter()
    jax.block_until_ready(train(jax.random.PRNGKey(repeat)))
    speeds.append(SETTINGS["TOTAL_TIMESTEPS"] / (time.perf_counter() - started))
print(json.dumps({"env_steps_per_second": sorted(speeds)[1]}))
