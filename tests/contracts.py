"""Gymnasium environments that keep or break the contract, each in one way."""

import multiprocessing
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

NESTED = spaces.Dict(
    {
        "place": spaces.Discrete(3, start=-1),
        "all": spaces.Tuple([spaces.MultiBinary(2), spaces.Box(-9, 9, (2, 2))]),
        "levels": spaces.MultiDiscrete([2, 3], start=[1, 5]),
        "number": spaces.Box(0, 9, (), np.float64),
    }
)


class Plain(gymnasium.Env):
    """Observes zeros, pays 1 per step, and terminates in its fifth step."""

    observation_space: gymnasium.Space = spaces.Box(-9, 9, (2,), np.float32)
    action_space: gymnasium.Space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == 5, False, {}


class OldReset(Plain):
    def reset(self) -> Any:  # type: ignore[override]
        return np.zeros(2, np.float32)


class OnlyObservation(Plain):
    def reset(self, **options: Any) -> Any:
        return np.zeros(2, np.float32)


class FourValues(Plain):
    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 1.0, False, {}


class FailsToClose(FourValues):
    def step(self, action: Any) -> Any:
        return super().step(action)

    def close(self) -> None:
        raise RuntimeError("it was never open")


class NoReward(Plain):
    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), None, False, False, {}


class HugeReward(Plain):
    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), -1.79e308, False, False, {}


class WrongShape(Plain):
    def reset(self, **options: Any) -> Any:
        return np.zeros(3, np.float32), {}


class WrongDtype(Plain):
    def reset(self, **options: Any) -> Any:
        return "left", {}


class TextFlag(Plain):
    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 1.0, "False", False, {}


class Several(Plain):
    """Takes two choices at once, and observes the last ones."""

    action_space = spaces.MultiDiscrete([2, 3])

    def step(self, action: Any) -> Any:
        return np.asarray(action, np.float32), *super().step(action)[1:]


class Rendered(Plain):
    """Draws black pictures."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.zeros((4, 4, 3), np.uint8) if self.render_mode == "rgb_array" else None


class StartsProcess(Plain):
    """Starts a process, as simulators do."""

    def __init__(self) -> None:
        process = multiprocessing.get_context("spawn").Process(target=int)
        process.start()
        process.join()
        assert process.exitcode == 0


def several_vector(num_envs: int) -> SyncVectorEnv:
    """Returns several environments of two choices in Gymnasium's own vector environment."""
    return SyncVectorEnv([Several] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)


for kind in (
    OldReset,
    OnlyObservation,
    FourValues,
    FailsToClose,
    NoReward,
    HugeReward,
    WrongShape,
    WrongDtype,
    TextFlag,
):
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=9)
gymnasium.register("StartsProcess-v0", entry_point=StartsProcess)
