"""Gymnasium's environments as lanes: in this process, in workers, and in their own vector versions."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import counters
import gymnasium
import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.envs import gymnasium as backend
from qfleet.envs.conformance import Recording, check, record
from qfleet.envs.contract import BrokenContract
from qfleet.envs.failures import lane_seed
from qfleet.envs.host import HostEnv, LaneOptions
from qfleet.envs.vector_lanes import GymnasiumVector

NUM_LANES = 3


def play(env: HostEnv, rows: int, num_env_workers: int = 0, seed: int = 0, num_lanes: int = NUM_LANES) -> Recording:
    actions = np.random.default_rng(1).integers(env.spec.num_actions, size=(rows, num_lanes), dtype=np.int32)
    lanes = env.make_lanes(num_lanes, LaneOptions(num_env_workers=num_env_workers))
    try:
        return record(lanes, seed, actions)
    finally:
        lanes.close()


@pytest.mark.parametrize(
    ("name", "num_env_workers"),
    [
        ("CartPole-v1", 0),
        ("CartPole-v1", 2),
        ("FrozenLake-v1", 0),
        ("LunarLander-v3", 0),
        ("counters:LimitedCounter-v0", 2),
    ],
)
def test_conformance(name: str, num_env_workers: int) -> None:
    if name == "LunarLander-v3":
        pytest.importorskip("Box2D")
    assert [c for c in check(backend.make(name), num_steps=200, num_env_workers=num_env_workers) if not c.is_ok] == []


def plain_loop(name: str, lane: int, recorded: Recording) -> tuple[list[np.ndarray], list[float], list[bool]]:
    """Returns the observations, rewards and ends that a plain loop over one environment sees."""
    env = gymnasium.make(name)
    observation, _ = env.reset(seed=lane_seed(0, lane))
    observations, rewards, ends = [observation], [], []
    for action in recorded.action[:, lane]:
        if ends and ends[-1]:
            observation, reward, ended = env.reset()[0], 0.0, False
        else:
            observation, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        observations.append(observation)
        rewards.append(float(reward))
        ends.append(bool(ended))
    env.close()
    return observations, rewards, ends


@pytest.mark.parametrize("num_env_workers", [0, 2])
def test_rows_are_those_of_a_plain_loop_over_one_environment(num_env_workers: int) -> None:
    recorded = play(backend.make("MountainCar-v0"), 250, num_env_workers)
    assert recorded.ended.any()
    for lane in range(NUM_LANES):
        observations, rewards, ends = plain_loop("MountainCar-v0", lane, recorded)
        np.testing.assert_array_equal(recorded.observation[:, lane], observations)
        np.testing.assert_array_equal(recorded.reward[:, lane], rewards)
        np.testing.assert_array_equal(recorded.ended[:, lane], ends)


def test_a_lane_does_not_depend_on_how_many_there_are_nor_on_workers() -> None:
    env = backend.make("MountainCar-v0")
    few, many = play(env, 50, num_lanes=1), play(env, 50, num_env_workers=3, num_lanes=4)
    np.testing.assert_array_equal(few.observation[0, 0], many.observation[0, 0])


@pytest.mark.parametrize("num_env_workers", [0, 2])
def test_a_time_limit_truncates_and_the_final_observation_is_kept(num_env_workers: int) -> None:
    recorded = play(backend.make("counters:LimitedCounter-v0"), 8, num_env_workers)
    assert not recorded.terminated.any()
    np.testing.assert_array_equal(np.argwhere(recorded.truncated[:, 0]).ravel(), [2, 6])
    np.testing.assert_array_equal(recorded.observation[:, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3, 0])


def test_wide_numbers_become_float32_and_what_is_narrow_is_kept() -> None:
    assert backend.make("counters:Counter-v0").spec.observation_dtype == np.float32


def test_the_time_limit_is_what_gymnasium_makes_of_it() -> None:
    assert backend.make("CartPole-v1").spec.time_limit == 500
    assert backend.make("CartPole-v1", max_episode_steps=9).spec.time_limit == 9
    assert backend.make("counters:LimitedCounter-v0", max_episode_steps=-1).spec.time_limit is None
    assert backend.make("counters:Counter-v0").spec.time_limit is None


def test_discrete_spaces_may_start_anywhere() -> None:
    env = backend.make("counters:Offset-v0")
    lanes = env.make_lanes(1, LaneOptions())
    np.testing.assert_array_equal(lanes.reset(0), [[True, False, False]])
    lanes.send(np.array([1], np.int32))
    np.testing.assert_array_equal(lanes.recv().observation, [[False, True, False]])
    lanes.send(np.array([2], np.int32))
    assert lanes.recv().terminated.all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", r"no environment 'CartPol-v1'\. Did you mean CartPole-v1"),
        ("no_such_module:X-v0", "a Python module that can be imported, got 'no_such_module'"),
        ("Pendulum-v1", r"actions must be Discrete, got Box"),
    ],
)
def test_what_cannot_be_learned_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend.make(name)


def test_an_unknown_option_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"counters:Counter-v0 must be one that gymnasium\.make can make.*'size'"):
        backend.make("counters:Counter-v0", size=3)


def test_an_environment_that_workers_cannot_make_is_one_clear_error(tmp_path: Path) -> None:
    # Its entry point can be imported here, but a worker doesn't find the module.
    (tmp_path / "only_here.py").write_text("from counters import Counter\n")
    sys.path.insert(0, str(tmp_path))
    try:
        gymnasium.register("OnlyHere-v0", entry_point="only_here:Counter")
        env = backend.make("OnlyHere-v0")
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(ConfigError, match=r"a worker process can make, got: ModuleNotFoundError: .*'only_here'"):
        env.make_lanes(2, LaneOptions(num_env_workers=1))
    assert multiprocessing.active_children() == []


def test_an_environment_without_a_name_elsewhere_travels_to_workers_which_do_without_jax() -> None:
    from counters import Counter

    def make_where_jax_is_missing() -> Counter:
        is_worker = multiprocessing.parent_process() is not None
        assert not (is_worker and "jax" in sys.modules)  # importing JAX would cost workers time and memory for nothing
        return Counter(length=2)

    gymnasium.register("Closure-v0", entry_point=make_where_jax_is_missing)
    recorded = play(backend.make("Closure-v0"), 4, num_env_workers=1)
    np.testing.assert_array_equal(recorded.terminated[:, 0], [False, True, False, False])


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_a_vector_version_gives_the_rows_of_single_environments(mode: str) -> None:
    single, vector = (
        play(env, 40)
        for env in (backend.make("counters:Counter-v0"), backend.make("counters:VectorCounter-v0", mode=mode))
    )
    np.testing.assert_array_equal(single.observation[..., 1], vector.observation[..., 1])
    for name in ("reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(single, name), getattr(vector, name))
    assert not vector.is_overwritten


def test_same_step_autoreset_keeps_final_observations_and_starts_episodes_a_step_late() -> None:
    recorded = play(backend.make("counters:VectorCounter-v0", mode="SameStep"), 12)
    np.testing.assert_array_equal(recorded.observation[:, 0, 1], [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2])
    np.testing.assert_array_equal(recorded.reward[:, 0] // 1, [1, 2, 3, 4, 5, 0, 2, 3, 4, 5, 0, 2])
    np.testing.assert_array_equal(np.argwhere(recorded.terminated[:, 0]).ravel(), [4, 9])


def test_a_same_step_vector_version_gives_way_to_single_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(backend.make("counters:BothCounter-v0"), 6).observation[-1, 0, 1] == 0

    make_vector = counters.counter_vector
    monkeypatch.setattr(counters, "counter_vector", lambda **options: make_vector(mode="SameStep", **options))
    assert play(backend.make("counters:BothCounter-v0"), 6).observation[-1, 0, 1] == 0  # the vector version gives 1


def test_workers_need_single_environments() -> None:
    with pytest.raises(ConfigError, match="num_env_workers must be 0 for gym:counters:VectorCounter-v0"):
        backend.make("counters:VectorCounter-v0").make_lanes(2, LaneOptions(num_env_workers=1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, 0.0, r"the reward must have shape \(3,\), got \(\)"),
        (1, np.zeros((3, 1)), r"the reward must have shape \(3,\), got \(3, 1\)"),
        (2, False, r"terminated must have shape \(3,\), got \(\)"),
        (2, [None] * 3, "terminated must be made of numbers"),
        (3, np.array([0, 2, 1]), "truncated must be True or False in each lane, got 2"),
    ],
)
def test_a_vector_environment_returns_one_number_for_each_lane(field: int, value: Any, message: str) -> None:
    env, kind = counters.counter_vector(3), backend.make("counters:VectorCounter-v0")
    step = env.step
    env.step = lambda action: tuple(value if i == field else part for i, part in enumerate(step(action)))
    vector = GymnasiumVector(env, kind.encoder, kind.actions)
    vector.begin([0, 1, 2])
    vector.send(np.zeros(3, np.int32))
    with pytest.raises(BrokenContract, match=message):
        vector.recv()
