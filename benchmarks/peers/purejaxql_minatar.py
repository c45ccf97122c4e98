"""Trains purejaxql's PQN on a game of MinAtar with its own settings; runs in the peers' environment.

    python purejaxql_minatar.py CHECKOUT GAME ENV_STEPS SEED

purejaxql isn't packaged, so CHECKOUT is a folder with its repository. It imports three packages for logging and
configuration that aren't needed here. Prints the wall time of training and the returns of 100 episodes, in which one
action in a thousand is random.
"""

import importlib
import json
import sys
import time
import types
from typing import Any

import gymnax
import jax
import jax.numpy as jnp

checkout, game, env_steps, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
NUM_EPISODES, EPSILON = 100, 0.001
SETTINGS: dict[str, Any] = {  # from purejaxql/config/alg/pqn_minatar.yaml
    "TOTAL_TIMESTEPS": env_steps,
    "TOTAL_TIMESTEPS_DECAY": env_steps,
    "NUM_ENVS": 128,
    "NUM_STEPS": 32,
    "EPS_START": 1.0,
    "EPS_FINISH": 0.05,
    "EPS_DECAY": 0.1,
    "NUM_MINIBATCHES": 32,
    "NUM_EPOCHS": 2,
    "NORM_TYPE": "layer_norm",
    "LR": 5e-4,
    "MAX_GRAD_NORM": 10,
    "LR_LINEAR_DECAY": True,
    "GAMMA": 0.99,
    "LAMBDA": 0.65,
    "ENV_NAME": f"{game}-MinAtar",
    "TEST_DURING_TRAINING": False,
    "WANDB_MODE": "disabled",
}

sys.modules |= {name: types.ModuleType(name) for name in ("wandb", "hydra", "omegaconf")}
vars(sys.modules["hydra"])["main"] = lambda **_: lambda function: function
vars(sys.modules["omegaconf"])["OmegaConf"] = None
sys.path.insert(0, f"{checkout}/purejaxql")
peer = importlib.import_module("pqn_minatar")


def play(state: Any, key: jax.Array) -> jax.Array:
    """Returns the return of each lane's first episode, `[NUM_EPISODES]`, or NaN if it hasn't ended."""
    env, env_params = gymnax.make(SETTINGS["ENV_NAME"])
    network = peer.QNetwork(action_dim=env.action_space(env_params).n)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        obs, states, total, is_over = carry
        random_key, choice_key, step_key = jax.random.split(key, 3)
        q_values = network.apply({"params": state.params, "batch_stats": state.batch_stats}, obs, train=False)
        random = jax.random.randint(choice_key, (NUM_EPISODES,), 0, q_values.shape[-1])
        is_random = jax.random.uniform(random_key, (NUM_EPISODES,)) < EPSILON
        action = jnp.where(is_random, random, jnp.argmax(q_values, axis=-1))
        keys = jax.random.split(step_key, NUM_EPISODES)
        obs, states, reward, done, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, states, action, env_params)
        return (obs, states, total + jnp.where(is_over, 0.0, reward), is_over | done), None

    reset_key, key = jax.random.split(key)
    obs, states = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, NUM_EPISODES), env_params)
    start = (obs, states, jnp.zeros(NUM_EPISODES), jnp.zeros(NUM_EPISODES, bool))
    keys = jax.random.split(key, env_params.max_steps_in_episode + 1)
    (_, _, total, is_over), _ = jax.lax.scan(step, start, keys)
    return jnp.where(is_over, total, jnp.nan)


started = time.perf_counter()
trained = jax.block_until_ready(jax.jit(peer.make_train(SETTINGS))(jax.random.PRNGKey(seed)))
seconds = time.perf_counter() - started
returns = jax.jit(play)(trained["runner_state"][0], jax.random.PRNGKey(1000))
print(json.dumps({"seconds": seconds, "returns": returns.tolist()}))
