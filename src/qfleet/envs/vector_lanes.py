"""Lanes of environments that step together in one object: Gymnasium's VectorEnv, or ALE's or EnvPool's equivalent."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from qfleet.config.errors import RAISED_BY_USERS
from qfleet.envs.action_masks import KEY
from qfleet.envs.actions import Actions
from qfleet.envs.contract import BrokenContract, to_flags, to_lanes
from qfleet.envs.failures import Failure, FailureBudget, describe, lane_seed
from qfleet.envs.host import HostStep, LaneOptions
from qfleet.envs.observations import Encoder, first_not_finite


class VectorStep(NamedTuple):
    """Results of one step of a backend, `[lanes]` everywhere. The backend doesn't write to these arrays again.

    Rewards and flags of rows that start an episode may have any value, because `VectorLanes` clears them.
    """

    observation: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class VectorBackend(Protocol):
    """Environments that step together and return NEXT_STEP rows."""

    def begin(self, seeds: Sequence[int]) -> np.ndarray:
        """Starts an episode in every lane from its seed, which is below 2**31, and returns the first observations."""
        ...

    def send(self, action: np.ndarray) -> None:
        """Begins a step."""
        ...

    def recv(self) -> VectorStep:
        """Waits for the step and returns its results."""
        ...

    def close(self) -> None:
        """Frees the resources of the environments."""
        ...


class VectorLanes:
    """`HostLanes` of a backend. A backend can't replace a single lane, so if one fails, all are replaced."""

    def __init__(
        self, name: str, make_backend: Callable[[int], VectorBackend], num_lanes: int, options: LaneOptions
    ) -> None:
        self._make_backend, self._num_lanes = make_backend, num_lanes
        self._budget = FailureBudget(name, options.max_failures)
        self._backend = make_backend(num_lanes)
        self._error: BaseException | None = None
        self._seed = 0
        self._env_seeds = [0] * num_lanes  # the seeds that the backend began with
        self._ended = np.zeros(num_lanes, bool)

    def reset(self, seed: int) -> np.ndarray:
        self._seed, self._error = seed, None
        try:
            return self._begin(rebuilds=0)
        except RAISED_BY_USERS as error:
            return self._replace(error)

    def send(self, action: np.ndarray) -> None:
        try:
            self._backend.send(action)
        except RAISED_BY_USERS as error:
            self._error = error  # handled in `recv`, which can return a failed step

    def recv(self) -> HostStep:
        try:
            if self._error is not None:
                raise self._error
            step = self._backend.recv()
            live = ~self._ended
            reward = _stored(np.where(live, step.reward, 0.0))
        except RAISED_BY_USERS as error:
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

    def _replace(self, error: BaseException) -> np.ndarray:
        """Replaces the backend and returns the first observations of the new one."""
        self._error = None
        while True:
            self._budget.spend(Failure(tuple(range(self._num_lanes)), self._env_seeds[0], describe(error)))
            with contextlib.suppress(*RAISED_BY_USERS):  # a broken environment may well fail to close too
                self._backend.close()
            try:
                self._backend = self._make_backend(self._num_lanes)
                return self._begin(rebuilds=self._budget.count)
            except RAISED_BY_USERS as another:
                error = another


def _stored(reward: np.ndarray) -> np.ndarray:
    """Returns rewards as the replay stores them, or raises `BrokenContract` if float32 can't hold one."""
    with np.errstate(over="ignore"):  # an overflow gives infinity, which the error reports more clearly
        stored = reward.astype(np.float32)
    if not np.isfinite(stored).all():
        lane = first_not_finite(stored)
        raise BrokenContract(f"the reward must be finite in float32, got {reward[lane]} in lane {lane}")
    return stored


class GymnasiumVector:
    """A Gymnasium VectorEnv of any autoreset mode, as a backend. `recv` does the work.

    How it makes NEXT_STEP rows depends on the autoreset mode of the environment:

    - NEXT_STEP: nothing needs to change.
    - DISABLED: a lane that has ended must be reset before the next step. It is reset again after that step, so that the
      step, whose action was for the final observation, leaves no trace.
    - SAME_STEP: a lane that has ended can neither wait nor be reset. So it takes the next step, but reports nothing of
      it. Its new episode begins one step late and lacks the reward of that step.

    The seed of the first lane decides for all lanes, because Gymnasium's vector environments draw random numbers for
    all lanes from one generator.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv, encoder: Encoder, actions: Actions) -> None:
        self._env, self._encoder, self._actions = env, encoder, actions
        self._mode = env.metadata["autoreset_mode"]
        self._action = np.zeros(env.num_envs, np.int32)
        self._nobody = np.zeros(env.num_envs, bool)
        self._ended = self._nobody
        self._obs = np.zeros(0)  # of the states that the environments are in

    def begin(self, seeds: Sequence[int]) -> np.ndarray:
        raw, info = self._env.reset(seed=seeds[0])
        self._ended = self._nobody
        self._obs = self._encoder.lanes(raw, info, self._nobody)
        return self._obs

    def send(self, action: np.ndarray) -> None:
        self._action = action

    def recv(self) -> VectorStep:
        begins = self._ended
        if self._mode is AutoresetMode.DISABLED and begins.any():
            self._obs = self._begin_anew(begins)
        raw, reward, terminated, truncated, info = self._env.step(self._actions.batch(self._valid_action(begins)))
        num_lanes = self._env.num_envs
        terminated, truncated = (
            to_flags("terminated", terminated, num_lanes),
            to_flags("truncated", truncated, num_lanes),
        )
        self._ended = (terminated | truncated) & ~begins
        # In mode SAME_STEP, the states are those of new episodes already.
        is_over = self._nobody if self._mode is AutoresetMode.SAME_STEP else terminated
        observation = self._obs = self._encoder.lanes(raw, info, is_over)
        if self._mode is AutoresetMode.DISABLED and begins.any():
            observation[begins] = self._begin_anew(begins)[begins]
        if self._mode is AutoresetMode.SAME_STEP and self._ended.any():
            observation = observation.copy()
            masks = info.get("final_info", {}).get(KEY)
            for lane in np.flatnonzero(self._ended):
                own = {} if masks is None else {KEY: masks[lane]}
                observation[lane] = self._encoder.lane(info["final_obs"][lane], own, bool(terminated[lane]))
        return VectorStep(observation, to_lanes("the reward", reward, num_lanes), terminated, truncated)

    def close(self) -> None:
        self._env.close()

    def _begin_anew(self, lanes: np.ndarray) -> np.ndarray:
        """Starts an episode in some lanes, `[lanes]` bool, and returns observations that are right in these lanes."""
        raw, info = self._env.reset(options={"reset_mask": lanes.copy()})
        return self._encoder.lanes(raw, info, ~lanes)

    def _valid_action(self, begins: np.ndarray) -> np.ndarray:
        """Returns the agent's actions, with valid ones for lanes whose action was for an episode that has ended."""
        mask = self._encoder.mask
        if mask is None or self._mode is AutoresetMode.NEXT_STEP or not begins.any():
            return self._action
        valid = self._obs[:, -mask.actions.num_actions :].argmax(axis=-1)
        return np.where(begins, valid, self._action)
