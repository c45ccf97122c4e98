"""Lanes of a user's own are checked at every step."""

from typing import Any

import numpy as np
import pytest

from qfleet.envs.contract import BrokenContract
from qfleet.envs.host import HostEnv, HostStep, LaneOptions
from qfleet.envs.registry import make_env, register_env
from qfleet.envs.spec import EnvSpec


class OwnLanes:
    """Lanes of a user's own. They return `wrong` in the second step."""

    def __init__(self, num_lanes: int, wrong: dict[str, Any]) -> None:
        self.num_lanes, self.wrong, self.steps = num_lanes, wrong, 0
        self.has_action_mask = True

    def reset(self, seed: int) -> np.ndarray:
        return np.zeros((self.num_lanes, 2), np.float32)

    def send(self, action: np.ndarray) -> None:
        self.steps += 1

    def recv(self) -> HostStep:
        nothing = np.zeros(self.num_lanes, bool)
        step = HostStep(self.reset(0), nothing.astype(np.float32), nothing, nothing, nothing)
        return step._replace(**self.wrong) if self.steps == 2 else step

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reward": np.float32([0, 0, np.nan])}, "finite as reward, got nan in lane 2"),
        ({"observation": np.float32([[0, 0], [0, np.inf], [0, 0]])}, "finite as observation, got inf in lane 1"),
        ({"reward": np.zeros(3)}, r"return reward as float32\[3\], got float64\[3\]"),
        ({"terminated": False}, r"return terminated as bool\[3\], got bool\[\]"),
    ],
)
def test_lanes_of_a_users_own_are_checked_at_every_step(
    wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfleet.envs.registry._registered", {})
    spec = EnvSpec(name="own", observation_shape=(2,), observation_dtype=np.dtype(np.float32), num_actions=2)
    env = HostEnv(spec, lambda n, options: OwnLanes(n, wrong), lambda n, options: OwnLanes(n, wrong))
    register_env("Mine", lambda: env)
    for make_lanes in (make_env("Mine").make_lanes, make_env("Mine").make_eval_lanes):
        lanes = make_lanes(3, LaneOptions())
        lanes.reset(0)
        lanes.send(np.zeros(3, np.int32))
        assert lanes.recv().reward.tolist() == [0, 0, 0] and lanes.has_action_mask
        lanes.send(np.zeros(3, np.int32))
        with pytest.raises(BrokenContract, match=f"the lanes of own must .*{message}"):
            lanes.recv()
