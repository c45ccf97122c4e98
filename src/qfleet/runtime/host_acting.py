"""The acting loop of environments outside the compiled program: one step of all lanes, and what became of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qfleet.core.types import identity
from qfleet.envs.host import HostLanes


class ReceivedRow(NamedTuple):
    """The results of one step of all lanes. `[lanes]` everywhere, or `[rows, lanes]` where rows are stacked."""

    reward: np.ndarray
    """float32."""
    terminated: np.ndarray
    """bool."""
    truncated: np.ndarray
    """bool."""
    failed: np.ndarray
    """bool, the environment failed and was replaced."""
    no_step: np.ndarray
    """bool, the row holds no step, because the lane was at a final observation or its environment failed. The action
    counts for nothing, and the observation after the row starts a new episode."""
    episode_ended: np.ndarray
    """bool, the step was the last one of its episode."""
    episode_return: np.ndarray
    """float64, undiscounted, of the lane's episode up to this step."""
    episode_steps: np.ndarray
    """int64, steps of that episode so far."""

    @property
    def returns(self) -> list[float]:
        """The returns of the episodes that ended."""
        return self.episode_return[self.episode_ended].tolist()

    @property
    def lengths(self) -> list[int]:
        """The lengths of the episodes that ended, in environment steps."""
        return self.episode_steps[self.episode_ended].tolist()

    @property
    def num_failures(self) -> int:
        """How many environments failed."""
        return int(np.sum(self.failed))


class HostActing:
    """Lanes outside the compiled program, and where the episode of each lane stands.

    The caller reads `obs` and `is_first`, chooses actions, and calls `send` and `receive` in turn. Between these two
    calls the environments step, and the caller may do other work.
    """

    obs: Any
    """`[lanes, ...]`, the newest observations, to act on next; wherever `place_obs` put them."""
    is_first: np.ndarray
    """`[lanes]` bool, `obs` starts an episode."""

    def __init__(
        self,
        lanes: HostLanes,
        seed: int,
        place_obs: Callable[[Any], Any] = identity,
        max_episode_steps: int | None = None,
    ) -> None:
        """Starts an episode in every lane.

        Args:
          lanes: the environments, which are reset.
          seed: of the lanes' first episodes.
          place_obs: moves observations to where they are used, such as a device.
          max_episode_steps: after so many steps an episode counts as ended, and what follows in it as another one. None
            counts whole episodes only.
        """
        self._lanes, self._place_obs, self._max_episode_steps = lanes, place_obs, max_episode_steps
        obs = lanes.reset(seed)
        num_lanes = len(obs)
        self.obs = place_obs(obs)
        self.is_first = np.ones(num_lanes, bool)
        self._is_final = np.zeros(num_lanes, bool)
        self._episode_return = np.zeros(num_lanes)
        self._episode_steps = np.zeros(num_lanes, np.int64)

    def send(self, action: np.ndarray) -> None:
        """Begins a step of all lanes with `[lanes]` int32 actions."""
        self._lanes.send(action)

    def receive(self) -> ReceivedRow:
        """Waits for the step that `send` began, and moves on to the observations after it.

        Raises:
          RunFailed: if too many environments have failed.
        """
        step = self._lanes.recv()
        self.obs = self._place_obs(step.observation)
        no_step = self._is_final | step.failed
        self.is_first, self._is_final = no_step, (step.terminated | step.truncated) & ~no_step
        self._episode_return = np.where(no_step, 0.0, self._episode_return + step.reward)
        self._episode_steps = np.where(no_step, 0, self._episode_steps + 1)
        episode_ended = self._is_final
        if self._max_episode_steps is not None:
            episode_ended = episode_ended | (self._episode_steps == self._max_episode_steps)
        row = ReceivedRow(
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            failed=step.failed,
            no_step=no_step,
            episode_ended=episode_ended,
            episode_return=self._episode_return,
            episode_steps=self._episode_steps,
        )
        if self._max_episode_steps is not None:
            self._episode_return = np.where(episode_ended, 0.0, self._episode_return)
            self._episode_steps = np.where(episode_ended, 0, self._episode_steps)
        return row
