"""Observations and actions of Gymnasium's spaces: encoded as its own `flatten` does, or refused, and never changed."""

import os
from typing import Any

import gymnasium
import numpy as np
import pytest
from contracts import NESTED
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from qfleet.config import ConfigError
from qfleet.envs.actions import MOST_COMBINATIONS, make_actions
from qfleet.envs.contract import BrokenContract, to_flag, to_numbers, to_reward
from qfleet.envs.observations import encoder_of_arrays, make_encoder

NUM_EXAMPLES = int(os.environ.get("QFLEET_FUZZ_EXAMPLES", "150"))


def samples(space: gymnasium.Space, count: int = 5) -> list[Any]:
    space.seed(0)
    return [space.sample() for _ in range(count)]


def batch_of(space: gymnasium.Space, items: list[Any]) -> Any:
    """Returns observations in a batch, as Gymnasium's vector environments return them."""
    return concatenate(space, items, create_empty_array(space, len(items)))


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (NESTED, (2 + 4 + 5 + 1 + 3,), np.float32),
        (spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), spaces.Discrete(2)]), (45,), bool),
        (spaces.Dict({"b": spaces.Box(0, 9, (2,), np.uint8), "a": spaces.Box(0, 9, (3,), np.uint8)}), (5,), np.uint8),
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), (14,), bool),
        (spaces.MultiBinary((2, 3)), (6,), bool),
        (spaces.Discrete(4, start=7), (4,), bool),
        (spaces.Box(-1, 1, ()), (1,), np.float32),
    ],
)
def test_observations_are_flattened_in_gymnasiums_order(space: gymnasium.Space, shape: tuple, dtype: Any) -> None:
    encoder = make_encoder(space, "x")
    assert (encoder.shape, encoder.dtype) == (shape, dtype)
    for raw in samples(space):
        encoded = encoder(raw)
        assert (encoded.shape, encoded.dtype) == (shape, dtype)
        np.testing.assert_array_equal(encoded, np.asarray(spaces.flatten(space, raw), np.float32))


def test_a_dict_is_joined_by_its_sorted_keys() -> None:
    encoder = make_encoder(spaces.Dict({"b": spaces.Box(0, 9, (1,)), "a": spaces.Box(0, 9, (2,))}), "x")
    np.testing.assert_array_equal(encoder({"b": np.array([3.0]), "a": np.array([1.0, 2.0])}), [1, 2, 3])


@pytest.mark.parametrize("space", [NESTED, spaces.Discrete(4), spaces.Box(-1, 1, (2, 2)), spaces.MultiBinary(3)])
def test_a_batch_is_its_observations_and_is_told_from_a_single_one(space: gymnasium.Space) -> None:
    encoder = make_encoder(space, "x")
    raws = samples(space, 4)
    expected = np.stack([encoder(raw) for raw in raws])
    batch = batch_of(space, raws)
    np.testing.assert_array_equal(encoder(batch, 4), expected)
    for given in (batch, expected):
        encoded, is_batch = encoder.any_batch(given)
        assert is_batch
        np.testing.assert_array_equal(encoded, expected)
    for given in (raws[0], expected[0]):
        encoded, is_batch = encoder.any_batch(given)
        assert not is_batch
        np.testing.assert_array_equal(encoded, expected[:1])


def test_an_observation_of_integers_is_a_state_and_one_of_bools_is_one_hot() -> None:
    encoder = make_encoder(spaces.Discrete(3), "x")
    assert encoder.any_batch(np.arange(3))[0].tolist() == np.eye(3).tolist()
    assert encoder.any_batch(np.array([False, True, False]))[0].tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("space", "raw", "message"),
    [
        (spaces.Discrete(16), 16, "a whole number from 0 to 15, got 16"),
        (spaces.Discrete(16), 1.5, "a whole number from 0 to 15, got 1.5"),
        (spaces.Discrete(300, start=5), np.uint8(3), "from 5 to 304, got 3"),
        (spaces.Discrete(4), np.uint64(2**63), "from 0 to 3, got 9223372036854775808"),
        (spaces.MultiDiscrete([2, 3]), [1, 3], "whole numbers from 0 to 1, 0 to 2, got 3"),
        (spaces.MultiBinary(2), [0, 2], "must be 0 or 1, got 2"),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([0.5, 1]), "whole numbers that uint8 can hold, got 0.5"),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([256, 1]), "whole numbers that uint8 can hold, got 256"),
        (spaces.Box(-9, 9, (2,), np.int32), np.array([3e9, 1]), "whole numbers that int32 can hold, got 3000000000"),
        (spaces.Box(-9, 9, (2,)), np.array([1e300, 1]), "finite in float32, got 1e.300"),
        (spaces.Box(-9, 9, (2,)), [10**400, 1], "finite in float32, got inf"),
        (spaces.Box(-9, 9, (2,)), [np.nan, 1], "finite in float32, got nan"),
        (spaces.Box(-9, 9, (2,)), [[1], [1, 2]], "made of numbers"),
        (spaces.Box(-9, 9, (2,)), None, "made of numbers, got NoneType"),
        (spaces.Box(-9, 9, (2,)), np.zeros(3), r"shape \(2,\), got \(3,\)"),
        (NESTED, {"place": 0}, "a dict with keys .'all', 'levels', 'number', 'place'., got a dict with keys .'place'."),
        (
            NESTED,
            {"place": 5, "all": ([0, 1], np.zeros((2, 2))), "levels": [1, 5], "number": 0},
            r"the observation\['place'\] must be a whole number from -1 to 1, got 5",
        ),
        (
            NESTED,
            {"place": 0, "all": ([0, 1],), "levels": [1, 5], "number": 0},
            r"\['all'\] must be a tuple of 2, got 1 values",
        ),
    ],
)
def test_what_cannot_be_stored_unchanged_is_refused_by_name(space: gymnasium.Space, raw: Any, message: str) -> None:
    with pytest.raises(BrokenContract, match=message):
        make_encoder(space, "x")(raw)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Text(5), "must be a Box, Discrete, .* got Text"),
        (spaces.Dict({"a": spaces.Sequence(spaces.Discrete(2))}), "must be a Box, Discrete, .* got Sequence"),
        (spaces.Discrete(10**9), "must have 1 to 1000000 values, got 1000000000"),
        (spaces.Box(0, 1, (0,)), "must have 1 to 1000000 values, got 0"),
        (spaces.Dict({}), "must have 1 to 1000000 values, got 0"),
    ],
)
def test_other_spaces_are_refused(space: gymnasium.Space, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_encoder(space, "Mine-v0")


@pytest.mark.parametrize(
    ("space", "limit"),
    [
        (spaces.Box(0, 255, (84, 84, 3), np.float32), 255),
        (spaces.Box(0, 1, (3, 84, 84), np.float32), 1),
        (spaces.Box(0, 255, (84, 84), np.int64), 255),
        (spaces.Box(0, 2**16 - 1, (84, 84, 1), np.uint16), 2**16 - 1),
        (spaces.Box(0, 255, (84, 84), np.uint8), None),  # networks divide bytes by 255 anyway
        (spaces.Box(-np.inf, np.inf, (84, 84, 3)), None),
        (spaces.Box(0, 1, (60, 8)), None),  # may well be a table
        (spaces.Box(0, 255, (4,)), None),
    ],
)
def test_the_bounds_of_an_image_say_by_what_its_pixels_are_divided(space: gymnasium.Space, limit: float | None) -> None:
    assert make_encoder(space, "x").pixel_limit == limit


def test_actions_of_several_choices_become_one_and_the_last_choice_varies_fastest() -> None:
    actions = make_actions(spaces.MultiDiscrete([2, 3], start=[1, 5]), "x")
    assert actions.table.tolist() == [[1, 5], [1, 6], [1, 7], [2, 5], [2, 6], [2, 7]]
    assert "one choice among 6 combinations" in actions.message
    assert make_actions(spaces.MultiBinary(2), "x").table.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    offset = make_actions(spaces.Discrete(3, start=5), "x")
    assert [offset.one(i) for i in range(3)] == [5, 6, 7] and not offset.message


def test_too_many_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"at most {MOST_COMBINATIONS} combinations, got .* with 1024; choose fewer"):
        make_actions(spaces.MultiBinary(10), "x")


@pytest.mark.parametrize("reward", [1, True, np.float64(1), np.array([1.0]), np.ones((1, 1), np.int8), 1.0])
def test_a_reward_is_one_number_in_any_guise(reward: Any) -> None:
    assert to_reward(reward) == 1.0


@pytest.mark.parametrize("reward", [None, "1", [1, 2], -1.8e308, 10**400, np.inf, np.nan, 1 + 2j, {}, 3.5e38, []])
def test_a_reward_that_float32_cannot_hold_is_refused_by_name(reward: Any) -> None:
    with pytest.raises(BrokenContract, match="the reward must be"):
        to_reward(reward)


@pytest.mark.parametrize(("flag", "expected"), [(True, True), (np.False_, False), (1, True), (np.array([0]), False)])
def test_flags_are_true_or_false(flag: Any, expected: bool) -> None:
    assert to_flag("terminated", flag) is expected


@pytest.mark.parametrize("flag", ["False", None, 2, 0.5, [True, False], {}])
def test_other_flags_are_refused(flag: Any) -> None:
    with pytest.raises(BrokenContract, match="terminated must be"):
        to_flag("terminated", flag)


ODD_NUMBERS = (
    0, 1, -1, 2, 255, 256, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-50, 3.4028235e38, 3.5e38, 1.8e308, np.nan,
    np.inf, -np.inf, True, None, "1", b"1", 1j, np.uint8(255), np.int64(-(2**63)), np.float16(1.5), np.bool_(True),
    np.datetime64("2020-01-01"), [], {}, (), object(), np.array(None),
)  # fmt: skip


def random_space(rng: np.random.Generator, depth: int = 2) -> gymnasium.Space:
    kind = rng.integers(7 if depth else 5)
    if kind == 0:
        return spaces.Discrete(int(rng.integers(1, 5)), start=int(rng.integers(-3, 4)))
    if kind == 1:
        return spaces.MultiDiscrete(rng.integers(1, 5, 3), start=rng.integers(-3, 4, 3))
    if kind == 2:
        return spaces.MultiBinary(tuple(rng.integers(1, 3, 2).tolist()))
    if kind in (3, 4):
        dtype = rng.choice(["uint8", "int8", "int32", "int64", "float16", "float32", "float64", "bool"])
        return spaces.Box(0, 1, tuple(rng.integers(1, 4, rng.integers(3)).tolist()), np.dtype(dtype))
    inner = [random_space(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    return spaces.Tuple(inner) if kind == 5 else spaces.Dict({f"k{rng.integers(99)}": each for each in inner})


def damaged(raw: Any, rng: np.random.Generator) -> Any:
    """Returns an observation with something odd in one place."""
    odd = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
    if isinstance(raw, dict) and rng.random() < 0.9:
        key = str(rng.choice(list(raw)))
        return {**raw, key: damaged(raw[key], rng)}
    if isinstance(raw, tuple) and raw and rng.random() < 0.9:
        i = int(rng.integers(len(raw)))
        return (*raw[:i], damaged(raw[i], rng), *raw[i + 1 :])
    if isinstance(raw, np.ndarray) and raw.size and rng.random() < 0.7:
        if rng.random() < 0.3:
            return raw.astype(rng.choice(["float64", "int64", "float16", "uint8", "object"]))
        array = raw.astype(object)
        array.flat[rng.integers(raw.size)] = odd
        return array if rng.random() < 0.5 else array.tolist()
    return odd


def same(encoded: np.ndarray, raw: Any, space: gymnasium.Space) -> bool:
    """Returns whether an encoding holds the numbers of a raw observation, computed by hand for each part."""

    def flat(space: gymnasium.Space, raw: Any) -> list[float]:
        if isinstance(space, spaces.Dict):
            return [number for key, inner in space.spaces.items() for number in flat(inner, raw[key])]
        if isinstance(space, spaces.Tuple):
            return [number for inner, part in zip(space.spaces, raw, strict=True) for number in flat(inner, part)]
        numbers = [float(number) for number in np.asarray(raw, object).flat]
        if isinstance(space, spaces.Discrete):
            return [float(numbers[0] == space.start + i) for i in range(space.n)]
        if isinstance(space, spaces.MultiDiscrete):
            return [
                float(number == start + i)
                for number, start, count in zip(numbers, space.start.flat, space.nvec.flat, strict=True)
                for i in range(count)
            ]
        return numbers

    return np.array_equal(encoded.ravel().astype(np.float64), np.array(flat(space, raw), np.float32).astype(np.float64))


def test_fuzzed_observations_are_encoded_unchanged_or_refused() -> None:
    """Every observation is either the same after its encoding, within float32's precision, or a `BrokenContract`."""
    rng = np.random.default_rng(0)
    num_refused = 0
    for example in range(NUM_EXAMPLES):
        space = random_space(rng)
        space.seed(example)
        encoder, raw = make_encoder(space, "x"), space.sample()
        assert same(encoder(raw), raw, space), (space, raw)
        odd = damaged(raw, rng)
        try:
            encoded = encoder(odd)
            assert (encoded.shape, encoded.dtype) == (encoder.shape, encoder.dtype)
            assert same(encoded, odd, space), (space, odd, encoded)
            again, is_batch = encoder.any_batch(odd)
            assert not is_batch and np.array_equal(again[0], encoded)
        except BrokenContract:
            num_refused += 1
    assert NUM_EXAMPLES / 5 < num_refused < NUM_EXAMPLES


def test_fuzzed_rewards_and_flags_are_taken_unchanged_or_refused() -> None:
    rng = np.random.default_rng(1)
    for _ in range(NUM_EXAMPLES):
        value: Any = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
        if rng.random() < 0.3:
            value = [value]
        for convert in (to_reward, lambda value: to_flag("terminated", value)):
            try:
                taken = convert(value)
            except BrokenContract:
                continue
            (number,) = np.asarray(value, object).flat
            assert np.float32(taken) == np.float32(number) and np.isfinite(np.float32(taken)), value


def test_fuzzed_actions_are_those_of_the_space() -> None:
    rng = np.random.default_rng(2)
    for _ in range(NUM_EXAMPLES):
        space = random_space(rng, depth=0)
        try:
            actions = make_actions(space, "x")
        except ConfigError:
            assert isinstance(space, spaces.Box)
            continue
        for i in range(actions.num_actions):
            assert space.contains(actions.one(i)), (space, actions.one(i))
        assert len({str(entry) for entry in actions.table.tolist()}) == actions.num_actions


def test_arrays_of_an_environment_in_jax_are_taken_as_they_are() -> None:
    encoder = encoder_of_arrays((2,), np.dtype(np.float32))
    encoded, is_batch = encoder.any_batch([[1, 2], [3, 4]])
    assert is_batch and encoded.dtype == np.float32 and encoded.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(BrokenContract, match=r"shape \(4, 2\), got \(4, 3\)"):
        encoder.any_batch(np.zeros((4, 3)))


class Unspeakable:
    """An object that can neither be converted nor described."""

    def __repr__(self) -> str:
        raise RuntimeError("unspeakable")


def test_an_object_that_cannot_describe_itself_is_refused_as_any_other() -> None:
    with pytest.raises(BrokenContract, match="the reward must be made of numbers, got Unspeakable <"):
        to_numbers("the reward", Unspeakable())


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(2**40), "actions must be at most 1000000, got Discrete"),
        (spaces.MultiDiscrete([]), "must have a choice, and at most 1000 combinations, got MultiDiscrete"),
        (spaces.MultiBinary(20_000), r"at most 1000 combinations, got MultiBinary\(20000\); choose fewer"),
    ],
)
def test_actions_that_no_network_can_value_are_refused(space: gymnasium.Space, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_actions(space, "x")


@pytest.mark.parametrize("wrap", [lambda box: spaces.Dict(pixels=box), lambda box: spaces.Tuple([spaces.Dict(p=box)])])
def test_an_image_that_is_the_only_part_stays_an_image(wrap: Any) -> None:
    box = spaces.Box(0, 255, (40, 50, 3), np.float32)
    encoder, alone, raw = make_encoder(wrap(box), "x"), make_encoder(box, "x"), wrap(box).sample()
    image = raw["pixels"] if isinstance(raw, dict) else raw[0]["p"]
    assert (encoder.shape, encoder.dtype, encoder.pixel_limit) == ((40, 50, 3), np.float32, 255)
    np.testing.assert_array_equal(encoder(raw), alone(image["p"] if isinstance(image, dict) else image))
    assert encoder.any_batch(raw)[0].shape == (1, 40, 50, 3) and not encoder.messages


def test_an_empty_batch_of_parts_is_one() -> None:
    space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(-1, 1, (2, 2)))
    batch, is_batch = make_encoder(space, "x").any_batch({"a": [], "b": np.zeros((0, 2, 2))})
    assert batch.shape == (0, 7) and is_batch
