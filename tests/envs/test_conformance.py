"""The conformance suite finds each breach of the contract, one at a time."""

from collections.abc import Callable
from typing import Any

import counters  # noqa: F401  registers what is made below
import numpy as np
import probes
import pytest

from qfleet.envs import cartpole, gymnasium
from qfleet.envs.conformance import check
from qfleet.envs.host import HostEnv, HostStep, LaneOptions
from qfleet.envs.spec import InGraphEnv


def findings(env: InGraphEnv | HostEnv, num_steps: int = 40) -> list[str]:
    return [c.what for c in check(env, num_steps=num_steps) if not c.is_ok]


def test_environments_in_jax_conform() -> None:
    assert findings(cartpole.make(), 100) == []
    assert findings(probes.delayed_reward()) == []
    assert findings(probes.time_limit()) == []


def test_a_reward_that_is_not_a_number_is_found() -> None:
    assert findings(probes.nan_reward()) == ["training: numbers are finite", "evaluation: numbers are finite"]


class Broken:
    """Lanes that pass everything on, except that `change` alters each step."""

    def __init__(self, lanes: Any, change: Callable[["Broken", HostStep], HostStep]) -> None:
        self.lanes, self.change, self.close = lanes, change, lanes.close
        self.rows = 0
        self.kept: Any = None

    def reset(self, seed: int) -> np.ndarray:
        self.rows = 0
        return self.lanes.reset(seed)

    def send(self, action: np.ndarray) -> None:
        self.action = action
        self.lanes.send(action)

    def recv(self) -> HostStep:
        self.rows += 1
        return self.change(self, self.lanes.recv())


def wrong_dtype(lanes: Broken, step: HostStep) -> HostStep:
    return step._replace(reward=step.reward.astype(np.float64))


def pays_at_starts(lanes: Broken, step: HostStep) -> HostStep:
    return step._replace(reward=step.reward + np.float32(1))


def overwrites(lanes: Broken, step: HostStep) -> HostStep:
    lanes.kept = step.observation if lanes.kept is None else lanes.kept
    lanes.kept[:] = step.observation
    return step._replace(observation=lanes.kept)


def runs_on(lanes: Broken, step: HostStep) -> HostStep:
    return step._replace(truncated=np.zeros_like(step.truncated))


def forgets_the_seed(lanes: Broken, step: HostStep) -> HostStep:
    lanes.kept = (lanes.kept or 0) + 1
    return step._replace(observation=step.observation + np.float32(lanes.kept))


def drops_final_observations(lanes: Broken, step: HostStep) -> HostStep:
    is_start = (step.terminated | step.truncated)[:, None] & np.array([False, True])
    return step._replace(observation=np.where(is_start, np.float32(0), step.observation))


def heeds_every_action(lanes: Broken, step: HostStep) -> HostStep:
    return step._replace(observation=step.observation + lanes.action[:, None].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (wrong_dtype, "the first step"),
        (pays_at_starts, "training: rows after an end pay nothing"),
        (overwrites, "training: arrays are left alone"),
        (runs_on, "training: the time limit truncates"),
        (forgets_the_seed, "the same seed gives the same rows"),
        (drops_final_observations, "training: final observations are kept"),
        (heeds_every_action, "actions for final observations are ignored"),
    ],
)
def test_each_breach_is_found(change: Callable[[Broken, HostStep], HostStep], what: str) -> None:
    env = gymnasium.make("counters:LimitedCounter-v0")

    def make_lanes(num_lanes: int, options: LaneOptions) -> Broken:
        return Broken(env.make_lanes(num_lanes, options), change)

    assert what in findings(env._replace(make_lanes=make_lanes))
