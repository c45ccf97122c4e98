"""Lanes of single Gymnasium environments in this process."""

import numpy as np

from qfleet.envs.failures import FailureBudget
from qfleet.envs.host import HostStep, LaneOptions
from qfleet.envs.lane_group import LaneGroup, SingleEnv, make_arrays


class SingleLanes:
    """`HostLanes` that steps one environment after the other. `recv` does the work.

    An environment that hangs can't be replaced here, because it blocks the only process that could notice. Worker
    processes can replace it.
    """

    def __init__(self, env: SingleEnv, num_lanes: int, options: LaneOptions) -> None:
        self._num_lanes, self._encoder = num_lanes, env.encoder
        self._group = LaneGroup(env, range(num_lanes), options.max_failures)
        self._budget = FailureBudget(env.name, options.max_failures)
        self._action = np.zeros(num_lanes, np.int32)

    def reset(self, seed: int) -> np.ndarray:
        out = make_arrays(self._num_lanes, self._encoder)
        for failure in self._group.reset(seed, 0, out):
            self._budget.spend(failure)
        return out.observation

    def send(self, action: np.ndarray) -> None:
        self._action = action

    def recv(self) -> HostStep:
        out = make_arrays(self._num_lanes, self._encoder)
        for failure in self._group.step(self._action.tolist(), out):
            self._budget.spend(failure)
        return HostStep(*out)

    def render(self) -> np.ndarray:
        """Returns a picture of the first lane. Its environment must have been made with `render_mode="rgb_array"`."""
        return np.asarray(self._group.render())

    def close(self) -> None:
        self._group.close()
