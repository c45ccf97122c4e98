"""The adapter of gymnax, compared with gymnax's own functions under the same keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.envs.in_graph import Lanes, LaneStep, StepKeys, draw_step_keys, init_lanes, step_lanes
from qfleet.envs.registry import _MINATAR, check_env, list_envs, make_env
from qfleet.envs.spec import StepResult

gymnax = pytest.importorskip("gymnax")

# These tests spend their time on compiling, not on running.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.mark.parametrize("name", [*_MINATAR, "CartPole-v1", "Catch-bsuite"])
def test_every_step_is_gymnaxs(name: str) -> None:
    env = make_env(f"gymnax:{name}")
    reference, params = gymnax.make(name)

    @functools.partial(jax.jit, compiler_options=UNOPTIMISED)
    def both_reset(key: jax.Array) -> tuple[Any, Any]:
        return env.reset(key), reference.reset_env(key, params)

    @functools.partial(jax.jit, compiler_options=UNOPTIMISED)
    def both_step(state: Any, action: jax.Array, key: jax.Array) -> tuple[StepResult, Any]:
        return env.step(state, action, key), reference.step_env(key, state, action, params)

    (state, observation), (their_observation, their_state) = both_reset(jax.random.key(0))
    np.testing.assert_array_equal(observation, their_observation)
    jax.tree.map(np.testing.assert_array_equal, state, their_state)
    actions = np.random.default_rng(1).integers(env.spec.num_actions, size=100)
    for action, key in zip(actions, jax.random.split(jax.random.key(1), 100), strict=True):
        ours, (their_observation, their_state, reward, terminated, _) = both_step(state, action, key)
        # MinAtar's observations are bool here and float in gymnax, but nothing of them is lost.
        np.testing.assert_array_equal(ours.observation, their_observation)
        jax.tree.map(np.testing.assert_array_equal, ours.state, their_state)
        assert (ours.reward, ours.terminated, ours.truncated) == (reward, terminated, False)
        state = both_reset(key)[0][0] if terminated else ours.state
    assert ours.observation.dtype == env.spec.observation_dtype == (bool if "MinAtar" in name else np.float32)


def test_the_time_limit_shows_as_truncation() -> None:
    """A car that never pushes stays in its valley until gymnax's 200 steps are over."""
    env = make_env("gymnax:MountainCar-v0")
    assert env.spec.time_limit == 200

    def row(lanes: Lanes, draws: StepKeys) -> tuple[Lanes, LaneStep]:
        return step_lanes(env, lanes, jnp.ones(1, jnp.int32), draws)

    _, rows = jax.lax.scan(
        row,
        init_lanes(env, jax.random.key(0), jnp.arange(1)),
        draw_step_keys(env, jax.random.key(1), 210, jnp.arange(1)),
    )
    assert not rows.terminated.any()
    assert np.flatnonzero(rows.truncated[:, 0]).tolist() == [199]


def test_termination_is_not_truncation() -> None:
    """Catch terminates when the ball lands, in its ninth step."""
    env = make_env("gymnax:Catch-bsuite")

    def row(lanes: Lanes, draws: StepKeys) -> tuple[Lanes, LaneStep]:
        return step_lanes(env, lanes, jnp.ones(1, jnp.int32), draws)

    _, rows = jax.lax.scan(
        row,
        init_lanes(env, jax.random.key(0), jnp.arange(1)),
        draw_step_keys(env, jax.random.key(1), 12, jnp.arange(1)),
    )
    assert np.flatnonzero(rows.terminated[:, 0]).tolist() == [8]
    assert not rows.truncated.any()
    assert abs(rows.reward[8, 0]) == 1


def test_a_discrete_observation_becomes_one_hot() -> None:
    env = make_env("gymnax:FrozenLake-misc")
    _, observation = env.reset(jax.random.key(0))
    assert observation.dtype == bool and observation.tolist() == [True] + [False] * 15


# MNISTBandit reads image files that gymnax doesn't ship.
@pytest.mark.parametrize("name", sorted(set(gymnax.registered_envs) - {"MNISTBandit-bsuite"}))
def test_discrete_actions_keep_the_contract_and_continuous_ones_are_refused(name: str) -> None:
    env, params = gymnax.make(name)
    if hasattr(env.action_space(params), "n"):
        check_env(make_env(f"gymnax:{name}"), name)
    else:
        with pytest.raises(ConfigError, match=f"actions must be discrete, gymnax:{name} has Box"):
            make_env(f"gymnax:{name}")


def test_the_listed_names_exist_in_gymnax() -> None:
    listed = {name.removeprefix("gymnax:") for name, _ in list_envs() if name.endswith("-MinAtar")}
    assert listed == {name for name in gymnax.registered_envs if name.endswith("-MinAtar")}


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no environment 'Breakout'.*Did you mean Breakout-MinAtar"):
        make_env("gymnax:Breakout")


def test_options_are_arguments_of_the_constructor_or_parameters() -> None:
    env = make_env("gymnax:MemoryChain-bsuite", memory_length=2, num_bits=3, max_steps_in_episode=50)
    assert (env.spec.observation_shape, env.spec.time_limit) == ((5,), 50)
    state, _ = env.reset(jax.random.key(0))
    ended = []
    for i in range(3):
        result = env.step(state, jnp.int32(0), jax.random.key(i))
        state, ended = result.state, [*ended, bool(result.terminated)]
    assert ended == [False, False, True]
    for options, message in (
        ({"memory_length": "20"}, "memory_length of gymnax:MemoryChain-bsuite as int, like its default 5, got '20'"),
        ({"length": 20}, "env_options must be options that gymnax:MemoryChain-bsuite takes"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_env("gymnax:MemoryChain-bsuite", **options)


def test_an_environment_that_cannot_be_made_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> Any:
        raise OSError("no network")  # as MNISTBandit's, which downloads its images

    monkeypatch.setattr(gymnax, "make", make)
    with pytest.raises(ConfigError, match="gymnax:Catch-bsuite must be one that .* can make, got OSError: no network"):
        make_env("gymnax:Catch-bsuite")
