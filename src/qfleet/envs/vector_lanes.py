"""Lanes of environments that step together in one object: a Gymnasium VectorEnv, ALE's, EnvPool's."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from qfleet.envs.failures import Failure, FailureBudget, describe, lane_seed
from qfleet.envs.host import HostStep, LaneOptions
from qfleet.envs.observations import Encoder, first_not_finite


class VectorStep(NamedTuple):
    """What a backend returns: `[lanes]` everywhere, in arrays that it doesn't write to again.

    Reward and flags of rows that start an episode don't matter: `VectorLanes` blanks them.
    """

    observation: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class VectorBackend(Protocol):
    """Environments that step together, with NEXT_STEP rows."""

    def begin(self, seeds: Sequence[int]) -> np.ndarray:
        """Starts an episode in every lane, from these seeds below 2**31, and returns the first observations."""
        ...

    def send(self, action: np.ndarray) -> None:
        """Begins a step."""
        ...

    def recv(self) -> VectorStep:
        """Ends it."""
        ...

    def close(self) -> None:
        """Frees what the environments hold."""
        ...


class VectorLanes:
    """`HostLanes` of a backend. If one lane fails all are replaced, for a backend doesn't replace single ones."""

    def __init__(
        self, name: str, make_backend: Callable[[int], VectorBackend], num_lanes: int, options: LaneOptions
    ) -> None:
        self._make_backend, self._num_lanes = make_backend, num_lanes
        self._budget = FailureBudget(name, options.max_failures)
        self._backend = make_backend(num_lanes)
        self._error: Exception | None = None
        self._seed = 0
        self._env_seeds = [0] * num_lanes  # what the backend was begun with
        self._ended = np.zeros(num_lanes, bool)

    def reset(self, seed: int) -> np.ndarray:
        self._seed, self._error = seed, None
        try:
            return self._begin(rebuilds=0)
        except Exception as error:
            return self._replace(error)

    def send(self, action: np.ndarray) -> None:
        try:
            self._backend.send(action)
        except Exception as error:
            self._error = error  # told by `recv`, which can return a failed step

    def recv(self) -> HostStep:
        try:
            if self._error is not None:
                raise self._error
            step = self._backend.recv()
            live = ~self._ended
            reward = np.where(live, step.reward, 0.0).astype(np.float32)
            if not np.isfinite(reward).all():
                lane = first_not_finite(reward)
                raise ValueError(f"the reward must be finite, got {reward[lane]} in lane {lane}")
        except Exception as error:
            nothing = np.zeros(self._num_lanes, bool)
            observation = self._replace(error)
            return HostStep(observation, nothing.astype(np.float32), nothing, nothing.copy(), ~nothing)
        terminated, truncated = live & step.terminated, live & step.truncated
        self._ended = terminated | truncated
        return HostStep(step.observation, reward, terminated, truncated, np.zeros(self._num_lanes, bool))

    def close(self) -> None:
        self._backend.close()

    def _begin(self, rebuilds: int) -> np.ndarray:
        self._ended = np.zeros(self._num_lanes, bool)
        self._env_seeds = [lane_seed(self._seed, lane, rebuilds) for lane in range(self._num_lanes)]
        return self._backend.begin(self._env_seeds)

    def _replace(self, error: Exception) -> np.ndarray:
        """Returns the first observations of new environments."""
        self._error = None
        while True:
            self._budget.spend(Failure(tuple(range(self._num_lanes)), self._env_seeds[0], describe(error)))
            with contextlib.suppress(Exception):  # that a broken environment can't be closed either is no news
                self._backend.close()
            try:
                self._backend = self._make_backend(self._num_lanes)
                return self._begin(rebuilds=self._budget.count)
            except Exception as another:
                error = another


class GymnasiumVector:
    """A Gymnasium VectorEnv of any autoreset mode as a backend; `recv` does the work.

    NEXT_STEP: as it is. DISABLED: lanes that have ended are reset before the step, as they must be, and again after
    it, so that the step with an action for the final observation leaves no trace. SAME_STEP: the lane can neither wait
    nor be reset, so that step is taken and not told: a new episode begins one step late, and loses that reward.

    The first lane's seed decides over all: Gymnasium's vector environments draw for all lanes from one generator.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv, encoder: Encoder, first_action: int) -> None:
        self._env, self._encoder, self._first_action = env, encoder, first_action
        self._mode = env.metadata["autoreset_mode"]
        self._action = np.zeros(env.num_envs, np.int64)
        self._ended = np.zeros(env.num_envs, bool)

    def begin(self, seeds: Sequence[int]) -> np.ndarray:
        raw, _ = self._env.reset(seed=seeds[0])
        self._ended = np.zeros(self._env.num_envs, bool)
        return self._encode(raw)

    def send(self, action: np.ndarray) -> None:
        self._action = action.astype(np.int64) + self._first_action

    def recv(self) -> VectorStep:
        begins = self._ended
        if self._mode is AutoresetMode.DISABLED and begins.any():
            self._env.reset(options={"reset_mask": begins.copy()})
        raw, reward, terminated, truncated, info = self._env.step(self._action)
        observation = self._encode(raw)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        self._ended = (terminated | truncated) & ~begins
        if self._mode is AutoresetMode.DISABLED and begins.any():
            raw, _ = self._env.reset(options={"reset_mask": begins.copy()})
            observation[begins] = self._encode(raw)[begins]
        if self._mode is AutoresetMode.SAME_STEP:
            for lane in np.flatnonzero(self._ended):
                observation[lane] = self._encoder(info["final_obs"][lane])
        return VectorStep(observation, np.array(reward, np.float32), terminated, truncated)

    def close(self) -> None:
        self._env.close()

    def _encode(self, raw: Any) -> np.ndarray:
        return self._encoder(raw, self._env.num_envs)
