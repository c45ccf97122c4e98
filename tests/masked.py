"""A Gymnasium environment with action masks, which raises at an invalid action, in several forms."""

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

LAST = 6


class Corridor(gymnasium.Env):
    """Cells 0 to 6. Actions: left, stay, right; at an end, one of them is invalid, and nobody stays in odd cells.

    It observes its cell, pays -1 per step, and terminates in the last cell, where no action is valid.
    """

    observation_space: gymnasium.Space = spaces.Box(0, LAST, (1,), np.float32)
    action_space: gymnasium.Space = spaces.Discrete(3)

    def __init__(self, place: Literal["info", "observation"] = "info", breach: str = "") -> None:
        self._place, self._breach = place, breach
        if place == "observation":
            self.observation_space = spaces.Dict(cell=Corridor.observation_space, action_mask=spaces.MultiBinary(3))

    @staticmethod
    def mask(cell: int) -> np.ndarray:
        return np.array([0 < cell < LAST, cell % 2 == 0 and cell < LAST, cell < LAST], np.int8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(LAST))
        return self._observed(has_stepped=False)

    def step(self, action: Any) -> Any:
        if not self.mask(self.cell)[action]:
            raise ValueError(f"action {action} is invalid in cell {self.cell}")
        self.cell += int(action) - 1
        observation, info = self._observed(has_stepped=True)
        return observation, -1.0, self.cell == LAST, False, info

    def _observed(self, *, has_stepped: bool) -> tuple[Any, dict]:
        cell, mask = np.array([self.cell], np.float32), self.mask(self.cell)
        if has_stepped:
            mask = {"shape": mask[:2], "values": mask * 2, "empty": mask * 0}.get(self._breach, mask)
        if self._place == "observation":
            return {"cell": cell, "action_mask": mask}, {}
        return cell, {} if has_stepped and self._breach == "missing" else {"action_mask": mask}


def corridors(num_envs: int, mode: str) -> SyncVectorEnv:
    """Returns corridors in Gymnasium's own vector environment."""
    makers = [lambda: gymnasium.wrappers.TimeLimit(Corridor(), 5)] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode(mode))


gymnasium.register("Corridor-v0", Corridor, max_episode_steps=5)
for mode in AutoresetMode:
    gymnasium.register(
        f"Corridors{mode.name.title().replace('_', '')}-v0", vector_entry_point=corridors, kwargs={"mode": mode.value}
    )
