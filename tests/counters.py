"""Gymnasium environments that count their steps, and fail in one way each when told to."""

import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

SEEDS_SHOWN = 2**20
"""Observations show seeds modulo this, so that float32 holds them exactly."""


class Counter(gymnasium.Env):
    """Observes `[seed of the last seeded reset, steps of this episode]`; step n pays n + action / 10.

    Terminates after `length` steps. From its step `at` on, counted over all its episodes, it does what `fault` says. If
    `once` names a file, only the first environment to create that file does so.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, length: int = 5, fault: str = "", at: int = 1, once: str = "") -> None:
        self.length, self.fault, self.at, self.once = length, fault, at, once
        self.total = self.steps = self.shown = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self.fault == "raise in reset":
            raise OSError("no game today")
        if seed is not None:
            self.shown = seed % SEEDS_SHOWN
        self.steps = 0
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.total += 1
        self.steps += 1
        reward = self.steps + action / 10
        observation = self.observe()
        if self.total >= self.at and self.fault and self.comes_first():
            if self.fault == "raise":
                raise ValueError("out of order")
            if self.fault == "exit":
                sys.exit()
            if self.fault == "hang":
                time.sleep(600)
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "nan observation":
                observation[1] = np.nan
            if self.fault == "nan reward":
                reward = np.nan
        return observation, reward, self.steps >= self.length, False, {}

    def observe(self) -> np.ndarray:
        return np.array([self.shown, self.steps], np.float64)

    def comes_first(self) -> bool:
        if not self.once:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class Offset(gymnasium.Env):
    """An environment whose discrete spaces start at 5. It observes the last action, and action 7 ends the episode."""

    observation_space = gymnasium.spaces.Discrete(3, start=5)
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        return 5, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        return action, 1.0, action == 7, False, {}


def counter_vector(num_envs: int, mode: str = "NextStep", max_episode_steps: int | None = None, **options: Any) -> Any:
    """Returns several counters in Gymnasium's own vector environment."""
    makers = [lambda: Counter(**options)] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode(mode))


gymnasium.register("Counter-v0", entry_point="counters:Counter")
gymnasium.register("LimitedCounter-v0", entry_point="counters:Counter", max_episode_steps=3)
gymnasium.register("Offset-v0", entry_point="counters:Offset")
gymnasium.register("VectorCounter-v0", vector_entry_point="counters:counter_vector")
gymnasium.register("BothCounter-v0", entry_point="counters:Counter", vector_entry_point="counters:counter_vector")
