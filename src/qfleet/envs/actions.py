"""The actions of Gymnasium's environments, and the numbers from 0 that the agent knows them by.

Worker processes import this module, so it must not import JAX.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qfleet.config.errors import ConfigError

if TYPE_CHECKING:
    import gymnasium

MOST_COMBINATIONS = 1_000
"""Largest number of combinations at which several choices at once become one. A network has an output for each."""

MOST_ACTIONS = 1_000_000
"""Largest number of actions of a Discrete space."""


@dataclasses.dataclass(frozen=True, eq=False)
class Actions:
    """The environment's actions in the order of the agent's numbers."""

    table: np.ndarray
    """`[num_actions, *shape]`: entry `i` is what the environment takes for the agent's action `i`."""
    message: str = ""
    """What the user should know about how the actions are numbered; '' if they are as the environment has them."""

    @property
    def num_actions(self) -> int:
        return len(self.table)

    @property
    def num_choices(self) -> int:
        """Number of choices that the environment takes at once."""
        return math.prod(self.table.shape[1:])

    @property
    def choices(self) -> np.ndarray:
        """`[num_actions, num_choices]`: the choices of each action, numbered from 0."""
        table = self.table.reshape(self.num_actions, -1)
        choices: np.ndarray = table - table.min(axis=0)
        return choices

    def one(self, action: int) -> Any:
        """Returns the environment's action: an `int`, or an array if the environment takes several choices at once."""
        entry = self.table[action]
        return entry.copy() if entry.ndim else int(entry)

    def batch(self, actions: np.ndarray) -> np.ndarray:
        """Returns the environments' actions, `[lanes, *shape]`, for the agent's, `[lanes]`."""
        return self.table[actions]


def numbered(num_actions: int, start: int = 0) -> Actions:
    """Returns actions that are whole numbers from `start` on."""
    return Actions(np.arange(start, start + num_actions))


def make_actions(space: "gymnasium.Space", name: str) -> Actions:
    """Returns the actions of a Discrete space, or of a MultiDiscrete or MultiBinary one with few combinations.

    Combinations are numbered like the digits of a number: the last choice varies fastest.

    Raises:
      ConfigError: if the space is another one, or has more than `MOST_ACTIONS` actions or `MOST_COMBINATIONS`
        combinations.
    """
    from gymnasium import spaces  # only here, because environments in JAX do without Gymnasium

    if isinstance(space, spaces.Discrete):
        if int(space.n) > MOST_ACTIONS:
            raise ConfigError(
                f"environment {name}: actions must be at most {MOST_ACTIONS}, got {space}; choose fewer, or wrap it in "
                f"gymnasium.wrappers.TransformAction"
            )
        return numbered(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        counts, starts = space.nvec, space.start
    elif isinstance(space, spaces.MultiBinary):
        counts, starts = np.full(space.shape, 2), np.zeros(space.shape, int)
    else:
        remedy = "choose an environment with discrete actions, or wrap it in gymnasium.wrappers.TransformAction"
        raise ConfigError(f"environment {name}: actions must be Discrete, got {space}; {remedy}")
    choices = [int(count) for count in counts.flat]
    combinations = math.prod(choices)
    if not choices or combinations > MOST_COMBINATIONS:
        found = f" with {combinations}" if combinations < 10**30 else ""
        raise ConfigError(
            f"environment {name}: actions of several choices must have a choice, and at most {MOST_COMBINATIONS} "
            f"combinations, got {space}{found}; choose fewer, or wrap it in gymnasium.wrappers.TransformAction"
        )
    digits = np.stack(np.unravel_index(np.arange(combinations), choices), -1)
    table = (digits.reshape(-1, *counts.shape) + starts).astype(space.dtype)
    message = (
        f"environment {name}: its {len(choices)} choices per action, {space}, are learned as one choice among "
        f"{combinations} combinations"
    )
    return Actions(table, message)
