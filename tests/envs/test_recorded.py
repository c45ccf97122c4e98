"""What a checkpoint records of an environment: it gives the same encoding and actions, and nothing else is taken."""

import copy
import json
from typing import Any

import contracts
import numpy as np
import pytest
from gymnasium import spaces

from qfleet.config import ConfigError
from qfleet.envs import gymnasium as backend
from qfleet.envs.host import HostEnv
from qfleet.envs.recorded import RecordedEnv, check_as_recorded, interface_of, is_record, record_of
from qfleet.envs.registry import make_env

NESTED = spaces.Dict(
    {
        "side": spaces.Discrete(3, start=-5),
        "pair": spaces.Tuple([spaces.MultiDiscrete([[2, 3], [4, 5]]), spaces.MultiBinary([2, 2])]),
        "inner": spaces.Dict({"speed": spaces.Box(-1, 1, (2,)), "none": spaces.Box(0, 9, (), np.int16)}),
    }
)
OBSERVATIONS = (
    spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (6, 7, 3), np.uint8), spaces.Box(0, 255, (6, 7, 3)),
    spaces.Discrete(4, start=2), spaces.MultiDiscrete([3, 4], start=[1, -1]), spaces.MultiBinary(5), NESTED,
)  # fmt: skip
ACTIONS = (
    spaces.Discrete(3, start=7), spaces.MultiDiscrete([2, 3], start=[1, 0]), spaces.MultiBinary(2),
    spaces.MultiDiscrete([[2], [2]], dtype=np.int8),
)  # fmt: skip


def made(observations: spaces.Space, actions: spaces.Space) -> HostEnv:
    class Mine(contracts.Plain):
        observation_space, action_space = observations, actions

    return backend.from_maker("Mine", Mine, {}, Mine())


def read_back(record: dict[str, Any] | None) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return content


def never() -> Any:
    raise AssertionError("the environment was made")


@pytest.mark.parametrize("observations", OBSERVATIONS, ids=str)
def test_observations_are_encoded_as_by_the_environment_itself(observations: spaces.Space) -> None:
    env = made(observations, ACTIONS[0])
    spec, encoder, _ = RecordedEnv("Mine", read_back(record_of(env)), never).interface
    assert spec == env.spec and encoder is not None and env.encoder is not None
    observations.seed(0)
    for _ in range(5):
        raw = observations.sample()
        encoded, expected = encoder(raw), env.encoder(raw)
        assert encoded.dtype == expected.dtype and encoder.rule == env.encoder.rule
        np.testing.assert_array_equal(encoded, expected)


@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_actions_are_those_of_the_environment_itself(space: spaces.Space) -> None:
    env = made(OBSERVATIONS[0], space)
    _, _, actions = RecordedEnv("Mine", read_back(record_of(env)), never).interface
    assert actions is not None and env.actions is not None
    assert actions.table.dtype == env.actions.table.dtype
    np.testing.assert_array_equal(actions.table, env.actions.table)


def test_an_environment_in_jax_has_nothing_to_encode() -> None:
    env = make_env("CartPole-v1")
    assert RecordedEnv("CartPole-v1", read_back(record_of(env)), never).interface == interface_of(env)


def test_what_a_record_cannot_hold_is_not_recorded() -> None:
    odd_keys = spaces.Dict({(1, 2): spaces.Discrete(2)})
    many = spaces.MultiDiscrete(np.full(20_000, 2))
    for observations in (odd_keys, many):
        env = made(observations, ACTIONS[0])
        assert record_of(env) is None
        check_as_recorded(env, None, "Mine")


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (spaces.Box(-1, 1, (4,)), ACTIONS[1], r"observations \[4\] now, and had \[3\]; undo the change"),
        (spaces.Box(0, 9, (3,), np.int8), ACTIONS[1], "observation_dtype int8 now, and had float32"),
        (OBSERVATIONS[0], ACTIONS[0], "num_actions 3 now, and had 6"),
        (OBSERVATIONS[0], spaces.MultiDiscrete([3, 2]), r"raw_actions .* now, and had"),
        (OBSERVATIONS[0], spaces.Discrete(6), r"raw_actions \{'start': 0\} now, and had"),
        (spaces.Tuple([spaces.Box(-1, 1, (3,))]), ACTIONS[1], "raw_observation .* now, and had"),
    ],
)
def test_a_change_is_told_when_the_environment_is_made(
    observations: spaces.Space, actions: spaces.Space, message: str
) -> None:
    record = read_back(record_of(made(OBSERVATIONS[0], ACTIONS[1])))
    recorded = RecordedEnv("Mine-v0", record, lambda: made(observations, actions))
    with pytest.raises(ConfigError, match=f"the environment Mine-v0 must be as it was in training; it has {message}"):
        recorded.make()
    assert RecordedEnv("Mine-v0", record, lambda: made(OBSERVATIONS[0], ACTIONS[1])).make().spec.num_actions == 6


ODD = (None, True, -1, 0, 2**70, 1.5, float("nan"), "", "object", [], {}, [[]], [None], [1, 2], {"start": "x"}, [2**40])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def test_whatever_is_in_a_records_place_is_read_or_refused() -> None:
    """Replaces every value of two records by odd ones, and reads what is taken for a record."""
    refused = 0
    for env in (made(NESTED, ACTIONS[1]), made(OBSERVATIONS[3], ACTIONS[0])):
        record = read_back(record_of(env))
        assert is_record(record)
        for path in places(record)[1:]:
            for value in ODD:
                content = copy.deepcopy(record)
                node: Any = content
                for key in path[:-1]:
                    node = node[key]
                node[path[-1]] = value
                if is_record(content):
                    RecordedEnv("Mine", content, never)
                else:
                    refused += 1
    assert refused > 500


def test_a_record_of_excessive_size_or_depth_is_refused() -> None:
    record = read_back(record_of(made(OBSERVATIONS[0], ACTIONS[0])))
    deep = record["raw_observation"]
    for _ in range(500):
        deep = {"keys": None, "parts": [deep]}
    for field, value in (
        ("raw_observation", deep),
        ("num_actions", 2**31),
        ("observation_shape", [2**20, 2**20]),
        ("raw_observation", {"shape": [3], "dtype": "bool", "choices": [[0, 2**40]] * 3}),
        ("name", "x" * 10_000),
    ):
        assert not is_record({**record, field: value})
