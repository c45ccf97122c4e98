"""Lanes that a user's own code steps. Each row is checked before anything can be learned from it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from qfleet.core.types import EnvSpec
from qfleet.envs.contract import BrokenContract
from qfleet.envs.host import HostEnv, HostLanes, HostStep, LaneOptions


def checked(env: HostEnv) -> HostEnv:
    """Returns the environment with lanes that raise `BrokenContract` if a number isn't finite or a shape is wrong."""

    def lanes_of(make: Callable[[int, LaneOptions], HostLanes]) -> Callable[[int, LaneOptions], HostLanes]:
        return lambda num_lanes, options: CheckedLanes(make(num_lanes, options), env.spec, num_lanes)

    return env._replace(make_lanes=lanes_of(env.make_lanes), make_eval_lanes=lanes_of(env.make_eval_lanes))


class CheckedLanes:
    """`HostLanes` around others that returns what they return."""

    def __init__(self, lanes: HostLanes, spec: EnvSpec, num_lanes: int) -> None:
        self._lanes, self._name = lanes, spec.name
        self._observation = (spec.observation_dtype, (num_lanes, *spec.lane_shape))
        flags = (np.dtype(bool), (num_lanes,))
        self._step = (self._observation, (np.dtype(np.float32), (num_lanes,)), flags, flags, flags)

    def reset(self, seed: int) -> np.ndarray:
        observation = self._lanes.reset(seed)
        self._check("observation of reset", observation, self._observation)
        return observation

    def send(self, action: np.ndarray) -> None:
        self._lanes.send(action)

    def recv(self) -> HostStep:
        step = self._lanes.recv()
        for name, array, wanted in zip(HostStep._fields, step, self._step, strict=True):
            self._check(name, array, wanted)
        return step

    def close(self) -> None:
        self._lanes.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lanes, name)  # what only some lanes have, such as `render`

    def _check(self, what: str, array: Any, wanted: tuple[np.dtype, tuple[int, ...]]) -> None:
        got = getattr(array, "dtype", None), np.shape(array)
        if got != wanted:
            raise BrokenContract(
                f"the lanes of {self._name} must return {what} as {wanted[0]}{list(wanted[1])}, got "
                f"{got[0] or type(array).__name__}{list(got[1])}"
            )
        if array.dtype.kind == "f" and not (is_finite := np.isfinite(array)).all():
            lane = int(np.argwhere(~is_finite)[0][0])
            raise BrokenContract(
                f"the lanes of {self._name} must return numbers that are finite as {what}, got "
                f"{array[~is_finite].flat[0]} in lane {lane}"
            )
