"""Wall time of Stable-Baselines3's DQN on LunarLander, with rl-zoo's settings, and its mean return over 100 episodes.

python sb3_lunar_lander.py SEED
"""

import json
import sys
import time

import gymnasium
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy

ENV_STEPS = 100_000

seed = int(sys.argv[1])
model = DQN(
    "MlpPolicy",
    gymnasium.make("LunarLander-v3"),
    seed=seed,
    learning_rate=6.3e-4,
    batch_size=128,
    buffer_size=50_000,
    learning_starts=0,
    gamma=0.99,
    target_update_interval=250,
    train_freq=4,
    gradient_steps=-1,
    exploration_fraction=0.12,
    exploration_final_eps=0.1,
    policy_kwargs={"net_arch": [256, 256]},
)
started = time.perf_counter()
model.learn(ENV_STEPS, log_interval=None)
seconds = time.perf_counter() - started
test = gymnasium.make("LunarLander-v3")
test.reset(seed=1000 + seed)
mean, _ = evaluate_policy(model, test, n_eval_episodes=100, warn=False)
print(json.dumps({"seconds": seconds, "env_steps": ENV_STEPS, "return_mean": float(mean)}))
