"""Single Gymnasium environments that are stepped one after the other, in this process or in a worker.

Worker processes import this module, so it must not import JAX.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from qfleet.config.errors import RAISED_BY_USERS, ConfigError
from qfleet.envs.actions import Actions
from qfleet.envs.contract import BrokenContract, at, explain, reset_env, step_env
from qfleet.envs.failures import Failure, describe, lane_seed
from qfleet.envs.observations import Encoder

_ALIGNMENT = 64  # bytes, so that no two arrays share a cache line


class StepArrays(NamedTuple):
    """The results of one step of some lanes. The fields are those of `HostStep`, `[lanes]` everywhere."""

    observation: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    failed: np.ndarray

    def of(self, lanes: slice) -> "StepArrays":
        """Returns views of the arrays, restricted to some lanes."""
        return StepArrays(*(array[lanes] for array in self))


def make_arrays(num_lanes: int, encoder: Encoder, buffer: Any = None) -> StepArrays:
    """Returns arrays in a buffer of `num_bytes`, or new arrays if there is no buffer."""
    if buffer is None:
        return StepArrays(*(np.zeros(shape, dtype) for shape, dtype in _layout(num_lanes, encoder)))
    arrays, offset = [], 0
    for shape, dtype in _layout(num_lanes, encoder):
        arrays.append(np.frombuffer(buffer, dtype, math.prod(shape), offset).reshape(shape))
        offset += _padded(shape, dtype)
    return StepArrays(*arrays)


def num_bytes(num_lanes: int, encoder: Encoder) -> int:
    """Returns the size in bytes of the buffer that `make_arrays` divides."""
    return sum(_padded(shape, dtype) for shape, dtype in _layout(num_lanes, encoder))


def _layout(num_lanes: int, encoder: Encoder) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Returns the shape and dtype of each field of `StepArrays`."""
    flag = ((num_lanes,), np.dtype(bool))
    return [((num_lanes, *encoder.lane_shape), encoder.dtype), ((num_lanes,), np.dtype(np.float32)), flag, flag, flag]


def _padded(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def make_single(registered: EnvSpec, options: dict[str, Any], **further_options: Any) -> gymnasium.Env:
    """Returns one environment as Gymnasium makes it.

    Workers call this function, so it must be in a module that doesn't import JAX.
    """
    # Gymnasium's checker takes time in every step, and `qfleet check-env` checks more.
    return gymnasium.make(registered, disable_env_checker=True, **{**options, **further_options})


class MakeNew:
    """A user's function that must return a new environment each time, because lanes can't share one.

    Workers call it, so it must be in a module that doesn't import JAX.
    """

    def __init__(self, name: str, make: Callable[..., gymnasium.Env], env: gymnasium.Env) -> None:
        self._name, self._make = name, make
        self._last: weakref.ref[gymnasium.Env] | None = weakref.ref(env.unwrapped)

    def __call__(self, **options: Any) -> gymnasium.Env:
        env = self._make(**options)
        if self._last is not None and self._last() is env.unwrapped:  # even if a new wrapper is around it
            raise ConfigError(
                f"environment {self._name} must be a new one for each lane, but its maker returned the same object "
                f"twice; make it inside the function, as in `lambda: gymnasium.make(...)`"
            )
        self._last = weakref.ref(env.unwrapped)
        return env

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}  # what another process makes is new to this one


class SingleEnv(NamedTuple):
    """A Gymnasium environment, as a maker of single instances for lanes."""

    name: str
    make: Callable[[], gymnasium.Env]
    encoder: Encoder
    actions: Actions


class LaneGroup:
    """The environments of some lanes. Each is replaced when it fails."""

    def __init__(self, env: SingleEnv, lanes: Sequence[int], max_failures: int) -> None:
        self._lanes = [_LaneEnv(env, lane, max_failures) for lane in lanes]

    def reset(self, seed: int, rebuilds: int, out: StepArrays) -> list[Failure]:
        """Starts an episode in every lane, writes the first observations into `out` and returns the failures."""
        failures = []
        for i, lane in enumerate(self._lanes):
            out.observation[i] = lane.reset(seed, rebuilds)
            failures += lane.take_failures()
        return failures

    def step(self, actions: Sequence[int], out: StepArrays) -> list[Failure]:
        """Steps every lane, writes the results into `out` and returns the failures."""
        failures = []
        for i, (lane, action) in enumerate(zip(self._lanes, actions, strict=True)):
            out.observation[i], out.reward[i], out.terminated[i], out.truncated[i] = lane.step(action)
            lane_failures = lane.take_failures()
            out.failed[i] = bool(lane_failures)
            failures += lane_failures
        return failures

    def render(self) -> Any:
        """Returns the picture that the environment of the first lane renders."""
        return self._lanes[0].render()

    def close(self) -> None:
        """Closes every environment."""
        for lane in self._lanes:
            lane.close()


class _LaneEnv:
    """The environment of one lane, with NEXT_STEP autoreset. It is replaced when it fails."""

    def __init__(self, env: SingleEnv, lane: int, max_failures: int) -> None:
        self._make_env, self._encoder, self._actions = env.make, env.encoder, env.actions
        self._lane = lane
        self._max_failures = max_failures
        self._env = env.make()
        self._has_worked = False  # until a step has, a failure may mean that the environment never can
        self._ended = False
        self._seed = self._rebuilds = self._env_seed = 0
        self._failures: list[Failure] = []

    def reset(self, seed: int, rebuilds: int) -> np.ndarray:
        self._seed, self._rebuilds = seed, rebuilds
        try:
            return self._begin_seeded()
        except RAISED_BY_USERS as error:  # a user's environment may raise anything
            return self._replace(error)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        try:
            if self._ended:
                # Without a seed, the environment continues with its own random numbers.
                return self._begin(None), 0.0, False, False
            raw, reward, terminated, truncated, info = step_env(self._env, self._actions.one(action))
            observation = self._encode(raw, info, "step", terminated)
            self._ended = terminated or truncated
            self._has_worked = True
            return observation, reward, terminated, truncated
        except RAISED_BY_USERS as error:
            return self._replace(error), 0.0, False, False

    def render(self) -> Any:
        return self._env.render()

    def take_failures(self) -> list[Failure]:
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        with contextlib.suppress(*RAISED_BY_USERS):  # a broken environment may well fail to close too
            self._env.close()

    def _begin_seeded(self) -> np.ndarray:
        self._env_seed = lane_seed(self._seed, self._lane, self._rebuilds)
        return self._begin(self._env_seed)

    def _begin(self, seed: int | None) -> np.ndarray:
        raw, info = reset_env(self._env, seed)
        self._ended = False
        return self._encode(raw, info, "reset")

    def _encode(self, raw: Any, info: Any, method: str, terminated: bool = False) -> np.ndarray:
        try:
            return self._encoder.lane(raw, info, terminated)
        except BrokenContract as error:
            raise BrokenContract(f"{error}{at(self._env, method)}") from None

    def _replace(self, error: BaseException) -> np.ndarray:
        """Replaces the environment and returns the first observation of the new one.

        If that fails too, it counts as another failure, and the next one is tried.
        """
        if not self._has_worked:
            error = explain(error, self._make_env, self._actions.one(0))
        self._fail(error)
        while len(self._failures) <= self._max_failures:
            self.close()
            self._rebuilds += 1
            try:
                self._env = self._make_env()
                return self._begin_seeded()
            except RAISED_BY_USERS as another:
                self._fail(another)
        # Never used, because so many failures end the run.
        return np.zeros(self._encoder.lane_shape, self._encoder.dtype)

    def _fail(self, error: BaseException) -> None:
        self._failures.append(Failure((self._lane,), self._env_seed, describe(error)))
