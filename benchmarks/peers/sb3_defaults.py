"""Stable-Baselines3's DQN with its default settings, until a mean return is confirmed or time is up.

python sb3_defaults.py ENV SEED MINUTES RETURN

Its exploration ends after a tenth of the steps of the whole run. So the run is given the steps that fit the minutes, as
a short run before it shows.
"""

import importlib
import json
import sys
import time

import gymnasium
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

MAX_EVAL_PERIOD_ENV_STEPS = 10_000  # slow environments are evaluated ten times in a run
TRIAL_ENV_STEPS = 3_000
TIME_LIMIT = 1_000  # for environments without one, which a greedy policy may never leave

name, seed, minutes, required = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
module, _, name = name.rpartition(":")
if module:
    importlib.import_module(module)


def make() -> gymnasium.Env:
    """Returns the environment in a form that Stable-Baselines3 takes."""
    env = gymnasium.make(name)
    if gymnasium.spec(name).max_episode_steps is None:
        env = gymnasium.wrappers.TimeLimit(env, TIME_LIMIT)
    if isinstance(env.observation_space, gymnasium.spaces.Tuple):  # SB3 takes no tuples
        env = gymnasium.wrappers.FlattenObservation(env)
    return env


class Stop(BaseCallback):
    """Evaluates now and then, and stops once the return is confirmed or time is up."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []
        self.period = min(MAX_EVAL_PERIOD_ENV_STEPS, max(1, env_steps // 10))
        self.solved: bool = False
        self.started: float = time.perf_counter()

    def _on_step(self) -> bool:
        if time.perf_counter() - self.started > 60 * minutes:
            return False
        if self.num_timesteps % self.period:
            return True
        for episodes in (20, 100):
            mean, _ = evaluate_policy(self.model, test, n_eval_episodes=episodes, warn=False)
            self.returns.append(float(mean))
            if mean < required:
                return True
        self.solved = True
        return False


test = make()
test.reset(seed=1000 + seed)
trial = DQN("MlpPolicy", make(), seed=seed)
trial_started = time.perf_counter()
trial.learn(TRIAL_ENV_STEPS, log_interval=None)
env_steps = round(60 * minutes * TRIAL_ENV_STEPS / (time.perf_counter() - trial_started))
model, stop = DQN("MlpPolicy", make(), seed=seed), Stop()
model.learn(env_steps, callback=stop, log_interval=None)
print(
    json.dumps(
        {
            "solved": int(stop.solved),
            "return": stop.returns[-1] if stop.returns else None,
            "best_return": max(stop.returns, default=None),
            "env_steps": model.num_timesteps,
            "seconds": time.perf_counter() - stop.started,
        }
    )
)
