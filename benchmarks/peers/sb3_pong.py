"""Agent steps/s of Stable-Baselines3's DQN on Pong: eight environments, two updates of 32 per eight steps.

It uses the Nature network and a buffer of 20,000 steps. Learning starts after 2,000 steps, and timing after that.
"""

import json
import time

import ale_py
import gymnasium
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

WARMUP, TIMED = 2_400, 2_000
NUM_ENVS = 8

gymnasium.register_envs(ale_py)
env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=NUM_ENVS, seed=0), n_stack=4)
model = DQN(
    "CnnPolicy",
    env,
    buffer_size=20_000,
    learning_starts=2_000,
    batch_size=32,
    train_freq=1,
    gradient_steps=2,
    target_update_interval=10_000,
    learning_rate=1e-4,
)
model.learn(WARMUP, log_interval=None)
started = time.perf_counter()
model.learn(TIMED, log_interval=None, reset_num_timesteps=False)
print(json.dumps({"env_steps_per_second": TIMED / (time.perf_counter() - started)}))
