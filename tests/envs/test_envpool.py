"""EnvPool's environments, if it is installed."""

import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.envs import envpool as backend
from qfleet.envs.conformance import check, record
from qfleet.envs.host import LaneOptions

pytest.importorskip("envpool")


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [("CartPole-v1", 150), ("FrozenLake-v1", 150), ("highway-fast-v0", 60), ("Breakout-v5", 120)],
)
def test_conformance(name: str, num_steps: int) -> None:
    assert [c for c in check(backend.make(name), num_steps=num_steps) if not c.is_ok] == []


def test_atari_follows_the_protocol() -> None:
    env = backend.make("SpaceInvaders-v5")
    spec = env.spec
    assert (spec.observation_shape, spec.frame_stack, spec.time_limit, spec.num_actions) == ((84, 84), 4, 27_000, 6)
    actions = np.random.default_rng(0).integers(6, size=(250, 2), dtype=np.int32)
    recordings = []
    for make_lanes in (env.make_lanes, env.make_eval_lanes):
        lanes = make_lanes(2, LaneOptions())
        recordings.append(record(lanes, 0, actions))
        lanes.close()
    training, evaluation = recordings
    assert set(np.unique(training.reward)) == {0, 1} and evaluation.reward.max() >= 5
    assert training.terminated.sum() > evaluation.terminated.sum()


def test_minigrid_is_one_hot() -> None:
    lanes = backend.make("MiniGrid-Empty-5x5-v0").make_lanes(2, LaneOptions())
    observation = lanes.reset(0)
    lanes.close()
    assert (observation.shape, observation.dtype) == ((2, 7, 7, 20), bool)
    np.testing.assert_array_equal(observation.sum(-1), 3)  # one kind, one colour, one state


def test_a_lane_does_not_depend_on_how_many_there_are() -> None:
    env = backend.make("CartPole-v1")
    few, many = env.make_lanes(1, LaneOptions()), env.make_lanes(3, LaneOptions())
    np.testing.assert_array_equal(few.reset(5)[0], many.reset(5)[0])
    few.close()
    many.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pong-v4", r"EnvPool has no environment 'Pong-v4'\. Did you mean Pong-v5"),
        ("Pendulum-v1", "actions must be Discrete"),
    ],
)
def test_what_cannot_be_learned_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend.make(name)


def test_an_unknown_option_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'sticky'"):
        backend.make("CartPole-v1", sticky=1)
    with pytest.raises(ConfigError, match="stack_num must be left as the protocol for Atari has it"):
        backend.make("Pong-v5", stack_num=4)
