"""Environment steps/s of Stable-Baselines3's DQN on CartPole, with rl-zoo's 128 updates of 64 per 256 steps."""

import json
import time

import gymnasium
from stable_baselines3 import DQN

WARMUP, TIMED = 2_000, 10_000

model = DQN(
    "MlpPolicy",
    gymnasium.make("CartPole-v1"),
    learning_rate=2.3e-3,
    batch_size=64,
    buffer_size=100_000,
    learning_starts=1_000,
    target_update_interval=10,
    train_freq=256,
    gradient_steps=128,
    exploration_fraction=0.16,
    exploration_final_eps=0.04,
    policy_kwargs={"net_arch": [256, 256]},
)
model.learn(WARMUP, log_interval=None)
started = time.perf_counter()
model.learn(TIMED, log_interval=None, reset_num_timesteps=False)
print(json.dumps({"env_steps_per_second": TIMED / (time.perf_counter() - started)}))
