"""Action masks reach the rows of every kind of lane, each with the state that it belongs to."""

import contextlib
import json

import gymnasium
import jax
import jax.numpy as jnp
import masked
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from masked_cells import make_cells

from qfleet.config import ConfigError
from qfleet.core.masks import split_lanes
from qfleet.envs import gymnasium as backend
from qfleet.envs.action_masks import ActionMask
from qfleet.envs.actions import make_actions
from qfleet.envs.conformance import check, record
from qfleet.envs.contract import BrokenContract
from qfleet.envs.first_step import check_works
from qfleet.envs.host import HostEnv, LaneOptions
from qfleet.envs.recorded import RecordedEnv, check_as_recorded, is_record, record_of
from qfleet.envs.registry import make_env, register_env
from qfleet.envs.spec import EnvSpec, InGraphEnv, with_masks_joined

FORMS = {
    "info": ("masked:Corridor-v0", {}),
    "observation": ("masked:Corridor-v0", {"place": "observation"}),
    **{mode.name: (f"masked:Corridors{mode.name.title().replace('_', '')}-v0", {}) for mode in AutoresetMode},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_row_has_the_mask_of_its_own_state(form: str) -> None:
    name, options = FORMS[form]
    env = backend.make(name, **options)
    assert env.spec.has_action_mask and env.spec.observation_shape == (1,) and env.spec.lane_shape == (4,)
    numbers = np.random.default_rng(0).integers(3, size=(100, 3), dtype=np.int32)
    with contextlib.closing(env.make_lanes(3, LaneOptions(max_failures=0))) as lanes:
        rows = record(lanes, 0, numbers, env.spec)
    cell, mask = split_lanes(rows.observation, env.spec)
    expected = np.array([[masked.Corridor.mask(int(each)) for each in row] for row in cell[..., 0]])
    np.testing.assert_array_equal(mask, expected)  # that of final observations included
    assert rows.terminated.any() and rows.truncated.any() and not rows.failed.any()


def test_workers_return_the_same_rows() -> None:
    env = backend.make("masked:Corridor-v0")
    numbers = np.random.default_rng(0).integers(3, size=(30, 2), dtype=np.int32)
    found = []
    for workers in (0, 1):
        with contextlib.closing(env.make_lanes(2, LaneOptions(num_env_workers=workers, max_failures=0))) as lanes:
            found.append(record(lanes, 0, numbers, env.spec))
    np.testing.assert_array_equal(found[0].observation, found[1].observation)


@pytest.mark.parametrize("form", FORMS)
def test_they_conform(form: str) -> None:
    name, options = FORMS[form]
    checks = {each.what: each for each in check(make_env(name, **options), num_steps=60)}
    assert [what for what, each in checks.items() if not each.is_ok] == []
    assert "2 to 3 of 3 actions, only valid ones were taken" in checks["training: masks leave a valid action"].detail


BREACHES = {
    "shape": r"must have shape \(3,\), a flag for each action, got \(2,\)",
    "values": "must be made of 0 and 1, got 2",
    "empty": "must have a valid action in each state that goes on, got none",
    "missing": "must be there after each reset and step, as it once was, got none",
}


@pytest.mark.parametrize(
    ("place", "breach"), [("observation", "shape"), ("observation", "empty"), *(("info", each) for each in BREACHES)]
)
def test_a_broken_mask_is_told_at_once(place: str, breach: str) -> None:
    env = backend.make("masked:Corridor-v0", place=place, breach=breach)
    name = "info" if place == "info" else "the observation"
    with pytest.raises(ConfigError, match=rf"{name}\['action_mask'\] {BREACHES[breach]} \(step of Corridor, "):
        check_works(env, LaneOptions())


def test_an_entry_of_another_size_is_no_mask() -> None:
    class Wrong(masked.Corridor):
        observation_space = spaces.Dict(cell=spaces.Box(0, 1, (1,)), action_mask=spaces.MultiBinary(4))

    with pytest.raises(ConfigError, match=r"observation\['action_mask'\] must have a flag for each of its 3 actions"):
        backend.from_maker("Wrong", Wrong, {}, Wrong())


def test_an_image_beside_a_mask_stays_an_image() -> None:
    class Board(masked.Corridor):
        observation_space = spaces.Dict(board=spaces.Box(0, 1, (8, 8, 2), np.int8), action_mask=spaces.MultiBinary(3))

    spec = backend.from_maker("Board", Board, {}, Board()).spec
    assert spec.observation_shape == (8, 8, 2) and spec.lane_shape == (131,)


def test_several_choices_may_have_a_mask_each() -> None:
    mask = ActionMask(make_actions(spaces.MultiDiscrete([2, 3], start=[5, 1]), "several"), is_in_observation=False)
    assert mask.one((np.array([0, 1]), np.array([1, 0, 1]))).tolist() == [False, False, False, True, False, True]
    assert mask.one(np.array([1, 0, 0, 0, 0, 1])).tolist() == [True, False, False, False, False, True]
    with pytest.raises(BrokenContract, match=r"6 flags, or a tuple of arrays of \[2, 3\] flags"):
        mask.one((np.ones(3), np.ones(2)))


def test_a_failed_environment_gives_the_mask_of_its_new_episode() -> None:
    """Action 0 fails in cell 0, and action 1 in odd cells."""
    env = backend.make("masked:Corridor-v0")
    with contextlib.closing(env.make_lanes(4, LaneOptions(max_failures=100))) as lanes:
        rows = record(lanes, 0, np.random.default_rng(0).integers(2, size=(40, 4), dtype=np.int32))
    assert rows.failed.any()
    cell, mask = split_lanes(rows.observation[1:][rows.failed], env.spec)
    np.testing.assert_array_equal(mask, [masked.Corridor.mask(int(each)) for each in cell[:, 0]])


@pytest.mark.parametrize("form", ["info", "observation"])
def test_a_record_knows_where_masks_are(form: str) -> None:
    name, options = FORMS[form]
    env = backend.make(name, **options)
    content = json.loads(json.dumps(record_of(env)))
    assert content["action_mask"] == form
    spec, encoder, _ = RecordedEnv(name, content, lambda: env).interface
    assert spec == env.spec and encoder is not None and env.encoder is not None
    raw, info = gymnasium.make("Corridor-v0", **options).reset(seed=0)
    np.testing.assert_array_equal(encoder.lane(raw, info), env.encoder.lane(raw, info))
    assert not is_record({**content, "action_mask": "elsewhere"})


def test_an_environment_that_has_got_or_lost_its_masks_has_changed() -> None:
    plain, other = backend.make("CartPole-v1"), backend.make("masked:Corridor-v0")
    older = {key: value for key, value in (record_of(plain) or {}).items() if key != "action_mask"}
    check_as_recorded(plain, older, "CartPole-v1")  # before there were masks, records didn't have the entry
    without = {**(record_of(other) or {}), "action_mask": None}
    with pytest.raises(ConfigError, match="it has action_mask info now, and had None"):
        check_as_recorded(other, without, "Corridor-v0")


# --- In JAX ---


def test_masks_of_an_environment_in_jax_are_those_of_its_states() -> None:
    env = make_env("masked_cells:Cells")
    assert isinstance(env, InGraphEnv) and env.spec.has_action_mask
    state, obs = env.reset(jax.random.key(0))
    for action in (1, 1, 1):
        expected = [float(state), *make_cells().action_mask(state)]
        assert obs.tolist() == expected
        result = env.step(state, jnp.int32(action), jax.random.key(1))
        state, obs = result.state, result.observation
        if result.terminated:
            break
    assert env.render is not None and env.render(state, np.asarray(obs)).shape == (4, 4, 3)
    assert [each.what for each in check(make_cells(), num_steps=40) if not each.is_ok] == []


def test_a_state_that_goes_on_without_a_valid_action_is_found() -> None:
    env = make_cells(mask=lambda cell: jnp.broadcast_to(cell != 1, 2))
    wrong = {each.what: each.detail for each in check(env, num_steps=20) if not each.is_ok}
    assert "states that go on have none" in wrong["training: masks leave a valid action"]
    state, key = jnp.int32(2), jax.random.key(0)
    rewards = [float(with_masks_joined(env).step(state, jnp.int32(action), key).reward) for action in (0, 1)]
    assert np.isnan(rewards[0]) and rewards[1] == 1.0  # a run ends at the first, and the episode at the second


def test_a_mask_of_another_shape_is_refused() -> None:
    register_env("Wrong", lambda: make_cells(mask=lambda cell: jnp.ones(3, bool)))
    with pytest.raises(ConfigError, match=r"the action mask must be bool\[2\], got bool\[3\]"):
        make_env("Wrong")
    register_env("Wrong", lambda: make_cells(has_action_mask=True)._replace(action_mask=None))
    with pytest.raises(ConfigError, match="has_action_mask must be left out, or given with an `action_mask`"):
        make_env("Wrong")


def test_lanes_of_ones_own_return_observations_joined_with_masks() -> None:
    inner = backend.make("masked:Corridor-v0")
    env = HostEnv(inner.spec, inner.make_lanes, inner.make_eval_lanes)
    register_env("Lanes", lambda: env)
    assert [each.what for each in check(make_env("Lanes"), num_steps=40) if not each.is_ok] == []
    register_env("Lanes", lambda: env._replace(spec=EnvSpec(**{**vars(inner.spec), "has_action_mask": False})))
    (first,) = check(make_env("Lanes"), num_steps=5)
    assert not first.is_ok and "float32[1, 1], got float32[1, 4]" in first.detail


def test_an_environment_without_masks_is_left_as_it_is() -> None:
    env = make_cells()._replace(action_mask=None)
    assert with_masks_joined(env) is env
