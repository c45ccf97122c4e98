"""Action masks of environments outside JAX: where they are, and how they are read.

Worker processes import this module, so it must not import JAX.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qfleet.config.errors import RAISED_BY_USERS, ConfigError
from qfleet.envs.actions import Actions
from qfleet.envs.contract import BrokenContract, has_mask, reset_env, summary, to_numbers

if TYPE_CHECKING:
    import gymnasium

    from qfleet.core.types import EnvSpec

KEY = "action_mask"
"""Name of the mask in `info`, or in a Dict observation."""


@dataclasses.dataclass(frozen=True, eq=False)
class ActionMask:
    """How the masks of one environment are found and read."""

    actions: Actions
    is_in_observation: bool
    """Whether it is an entry of the observation, which the agent's observation leaves out. Otherwise `info` has it."""

    @property
    def name(self) -> str:
        """Name of the mask in errors."""
        return f"the observation[{KEY!r}]" if self.is_in_observation else f"info[{KEY!r}]"

    @property
    def rule(self) -> str:
        """Description of a mask in a few words."""
        return f"{self.name}: {self.actions.num_actions} flags, 1 for each valid action"

    def take(self, raw: Any, info: Any) -> tuple[Any, Any]:
        """Returns the observation without its mask, and the mask; None if there is none."""
        if not self.is_in_observation:
            return raw, info.get(KEY) if isinstance(info, Mapping) else None
        if not isinstance(raw, Mapping):
            return raw, None  # the encoder says what is wrong with it
        return {key: value for key, value in raw.items() if key != KEY}, raw.get(KEY)

    def one(self, mask: Any, terminated: bool = False) -> np.ndarray:
        """Returns a mask, `[num_actions]` bool.

        An environment with several choices per action may give one mask for each choice, in a tuple, as Gymnasium's
        `MultiDiscrete.sample` takes them. A state that ended its episode may have no mask, or no valid action.

        Raises:
          BrokenContract: if it has another shape, other values than 0 and 1, or no valid action.
        """
        if mask is None:
            mask = self._missing(terminated)
        if isinstance(mask, tuple | list) and self.actions.num_choices > 1:
            mask = self._combined(mask)
        return self._checked(self._numbers(mask, ()), np.bool_(terminated))

    def batch(self, mask: Any, num_lanes: int, terminated: np.ndarray, is_there: Any = None) -> np.ndarray:
        """Returns the masks that a vector environment returned, `[num_lanes, num_actions]` bool.

        Args:
          mask: the masks of all lanes.
          num_lanes: number of lanes.
          terminated: `[num_lanes]` bool.
          is_there: `[num_lanes]` bool, whether each lane returned one; None if all did. Gymnasium calls it
            `_action_mask`.

        Raises:
          BrokenContract: as for `one`.
        """
        if mask is None:
            return np.stack([self._missing(bool(terminated.all()))] * num_lanes)
        numbers = self._numbers(mask, (num_lanes,))
        if is_there is not None and not (np.asarray(is_there, bool) | terminated).all():
            self._missing(False)
        return self._checked(numbers, terminated)

    def of_batch(self, mask: Any, num_states: int | None) -> np.ndarray:
        """Returns masks that a caller gave for some states, `[num_states, num_actions]` bool; None means one state.

        Raises:
          BrokenContract: as for `one`; also if there is none.
        """
        if mask is None:
            place = "in the observation" if self.is_in_observation else "as `mask`"
            raise BrokenContract(f"{self.name} must be given {place}, got none")
        if num_states is None:
            return self.one(mask)[None]
        return self.batch(mask, num_states, np.zeros(num_states, bool))

    def _missing(self, terminated: bool) -> np.ndarray:
        """Returns the mask of a state that has none."""
        if not terminated:
            raise BrokenContract(f"{self.name} must be there after each reset and step, as it once was, got none")
        return np.zeros(self.actions.num_actions, bool)

    def _numbers(self, mask: Any, batch: tuple[int, ...]) -> np.ndarray:
        numbers = to_numbers(self.name, mask)
        shape = (*batch, self.actions.num_actions)
        if numbers.shape != shape:
            raise BrokenContract(f"{self.name} must have shape {shape}, a flag for each action, got {numbers.shape}")
        return numbers

    def _checked(self, numbers: np.ndarray, terminated: np.ndarray | np.bool_) -> np.ndarray:
        if numbers.dtype != np.bool_:
            is_flag = (numbers == 0) | (numbers == 1)
            if not is_flag.all():
                raise BrokenContract(f"{self.name} must be made of 0 and 1, got {numbers[~is_flag][0]}")
            numbers = numbers.astype(bool)
        if not (numbers.any(axis=-1) | terminated).all():
            raise BrokenContract(f"{self.name} must have a valid action in each state that goes on, got none")
        return numbers

    def _combined(self, masks: Any) -> np.ndarray:
        """Returns the mask of all combinations, from one for each choice."""
        choices = self.actions.choices
        sizes = choices.max(axis=0) + 1
        each = [to_numbers(self.name, mask) for mask in masks]
        if [mask.shape for mask in each] != [(size,) for size in sizes]:
            raise BrokenContract(
                f"{self.name} must have {self.actions.num_actions} flags, or a tuple of arrays of {sizes.tolist()} "
                f"flags, got {summary(tuple(masks))}"
            )
        found: np.ndarray = np.all([mask[choices[:, i]] != 0 for i, mask in enumerate(each)], axis=0)
        return found


def join(obs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns an observation and its mask as one vector, or a batch of them; see `qfleet.core.masks`."""
    flat = obs.reshape(*mask.shape[:-1], math.prod(obs.shape[mask.ndim - 1 :]))  # a batch may be empty
    return np.concatenate([flat, mask.astype(obs.dtype)], axis=-1)


def is_joined(obs: Any, spec: "EnvSpec") -> bool:
    """Returns whether an array is what the agent sees, one observation or a batch, joined with masks already."""
    if not hasattr(obs, "dtype") or obs.dtype != spec.observation_dtype:
        return False
    joined = spec.lane_shape if spec.frame_stack == 1 else (*spec.lane_shape, spec.frame_stack)
    return joined in (obs.shape, obs.shape[1:])


def join_view(view: np.ndarray, mask: np.ndarray, spec: "EnvSpec") -> np.ndarray:
    """Returns what the agent sees, joined with masks.

    Args:
      view: `[batch, *agent_observation_shape]`.
      mask: `[batch, num_actions]`, of the newest frame.
      spec: of the environment.

    Returns:
      `[batch, values + num_actions]`, with one more axis of frames if they are stacked.
    """
    if spec.frame_stack == 1:
        return join(view, mask)
    masks = np.zeros((*mask.shape, spec.frame_stack), view.dtype)
    masks[..., -1] = mask
    return np.concatenate([view.reshape(len(view), -1, spec.frame_stack), masks], axis=1)


def find_mask(env: Any, space: Any, actions: Actions, name: str) -> ActionMask | None:
    """Returns how the masks of a Gymnasium environment are read; None if it has none. The environment may be reset.

    Raises:
      ConfigError: if its observations have an entry `action_mask` that can't be one.
    """
    from gymnasium import spaces
    from gymnasium.vector import VectorEnv

    if isinstance(space, spaces.Dict) and KEY in space.spaces:
        mask = space.spaces[KEY]
        if not isinstance(mask, spaces.MultiBinary | spaces.Box) or mask.shape != (actions.num_actions,):
            raise ConfigError(
                f"environment {name}: observation[{KEY!r}] must have a flag for each of its {actions.num_actions} "
                f"actions, got {mask}; declare it as MultiBinary({actions.num_actions}), or call it something else"
            )
        return ActionMask(actions, is_in_observation=True)
    try:
        info = env.reset(seed=0)[1] if isinstance(env, VectorEnv) else reset_env(env, 0)[1]
    except RAISED_BY_USERS:  # the first step of a run says what is wrong
        return None
    return ActionMask(actions, is_in_observation=False) if has_mask(info) else None


def without_mask(space: "gymnasium.Space", mask: ActionMask | None) -> "gymnasium.Space":
    """Returns an observation space without the entry that is the mask."""
    from gymnasium import spaces

    if mask is None or not mask.is_in_observation:
        return space
    assert isinstance(space, spaces.Dict)
    return spaces.Dict({key: inner for key, inner in space.spaces.items() if key != KEY})
