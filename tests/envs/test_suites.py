"""The table of suites, and adapters compared with the suites' own functions under the same keys."""

import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfleet
from qfleet.config import ConfigError
from qfleet.core.masks import split_lanes
from qfleet.envs.conformance import check
from qfleet.envs.in_graph import draw_step_keys, init_lanes, step_lanes
from qfleet.envs.registry import backend_of, check_env, default_topology, list_suite, make_env
from qfleet.envs.spec import InGraphEnv


def made(name: str, **options: Any) -> InGraphEnv:
    """Returns an environment. Skips the test if its suite isn't installed."""
    suite = name.partition(":")[0]
    pytest.importorskip(suite)
    env = make_env(name, **options)
    assert isinstance(env, InGraphEnv)
    return env


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("octax:pong", {"max_num_steps_per_episodes": 15}),
        ("pgx:2048", {}),
        ("pgx:minatar-breakout", {"max_episode_steps": 15}),
        ("xminigrid:MiniGrid-EmptyRandom-5x5", {"max_steps": 15}),
    ],
)
def test_environments_of_suites_conform(name: str, options: dict[str, Any]) -> None:
    checks = check(made(name, **options), num_steps=40 if options else 250)
    assert [each for each in checks if not each.is_ok] == []
    ends = next(each.detail for each in checks if each.what == "training: rows after an end pay nothing")
    assert int(ends.split()[0]) >= 4  # each lane has begun a second episode


@pytest.mark.parametrize("game", ["pong", "tetris", "cavern3"])
def test_every_step_is_octaxs_up_to_the_last_observation_at_the_time_limit(game: str) -> None:
    env = made(f"octax:{game}", max_num_steps_per_episodes=12)
    from octax.environments import create_environment

    reference, _ = create_environment(game, max_num_steps_per_episodes=12)
    key = jax.random.key(3)
    state, observation = env.reset(key)
    their_state, frames, _ = reference.reset(key)
    step = jax.jit(env.step)
    for t in range(12):
        np.testing.assert_array_equal(observation, np.transpose(frames, (2, 1, 0)))
        action = t % env.spec.num_actions
        state, observation, reward, terminated, truncated = step(state, jnp.int32(action), key)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            their_state, frames, *theirs, _ = reference.step(their_state, jnp.int32(action))
        assert [float(reward), bool(terminated), bool(truncated)] == [float(x) for x in theirs]
    np.testing.assert_array_equal(observation, np.transpose(frames, (2, 1, 0)))
    assert truncated and observation.any()
    assert (observation.shape, observation.dtype) == (env.spec.observation_shape, env.spec.observation_dtype)


@pytest.mark.parametrize("game", ["2048", "minatar-seaquest"])
def test_every_step_is_pgxs(game: str) -> None:
    env = made(f"pgx:{game}")
    import pgx

    reference = pgx.make(game)
    state, observation = env.reset(jax.random.key(0))
    theirs = reference.init(jax.random.key(0))
    step, their_step = jax.jit(env.step), jax.jit(reference.step)
    for key in jax.random.split(jax.random.key(1), 60):
        values, mask = split_lanes(observation, env.spec)
        np.testing.assert_array_equal(values, theirs.observation)
        if env.spec.has_action_mask:
            np.testing.assert_array_equal(mask, theirs.legal_action_mask)
        action = jnp.int32(np.flatnonzero(theirs.legal_action_mask)[-1])
        state, observation, reward, terminated, truncated = step(state, action, key)
        theirs = their_step(theirs, action, key)
        assert (reward, terminated, truncated) == (theirs.rewards[0], theirs.terminated, False)
        if terminated:
            break
    assert env.spec.has_action_mask == (game == "2048")


def test_freeway_of_pgx_ends_by_time_so_it_is_truncated() -> None:
    env = made("pgx:minatar-freeway")
    state, _ = env.reset(jax.random.key(0))
    state = state.replace(_terminate_timer=jnp.int32(1))
    step = jax.jit(env.step)
    ends = []
    for key in jax.random.split(jax.random.key(1), 2):
        state, _, _, terminated, truncated = step(state, jnp.int32(0), key)
        ends.append((bool(terminated), bool(truncated)))
    assert ends == [(False, False), (False, True)]


def test_a_limit_on_episodes_of_pgx_truncates_and_keeps_the_last_observation() -> None:
    env = made("pgx:minatar-freeway", max_episode_steps=3)
    lanes = init_lanes(env, jax.random.key(0), jnp.arange(2))
    draws = draw_step_keys(env, jax.random.key(1), 5, jnp.arange(2))
    state = jax.tree.map(lambda x: x[0], lanes.env_state)
    observations, truncated = [], []
    for t in range(5):
        row = jax.tree.map(lambda x, t=t: x[t], draws)
        lanes, result = step_lanes(env, lanes, jnp.ones(2, jnp.int32), row)
        observations.append(lanes.observation[0])
        truncated.append(bool(result.truncated[0]))
        if t < 3:
            state, expected, *_ = env.step(state, jnp.int32(1), row.keys[0])
    assert truncated == [False, False, True, False, False]
    np.testing.assert_array_equal(observations[2], expected)
    np.testing.assert_array_equal(observations[3], jax.tree.map(lambda x: x[3, 0], draws.fresh[1]))


def test_every_step_is_xminigrids_and_the_goal_is_no_time_limit() -> None:
    env = made("xminigrid:MiniGrid-Empty-5x5", max_steps=6)
    import xminigrid

    reference, params = xminigrid.make("MiniGrid-Empty-5x5", max_steps=6)
    step, their_step = jax.jit(env.step), jax.jit(lambda state, action: reference.step(params, state, action))
    key = jax.random.key(0)
    for actions, is_goal in (([0, 0, 1, 0, 0], True), ([1] * 6, False)):
        state, observation = env.reset(key)
        theirs = reference.reset(params, key)
        for t, action in enumerate(actions, 1):
            state, observation, reward, terminated, truncated = step(state, jnp.int32(action), key)
            theirs = their_step(theirs, jnp.int32(action))
            tile, colour = observation[..., :13].argmax(-1), observation[..., 13:].argmax(-1)
            np.testing.assert_array_equal(np.stack([tile, colour], -1), theirs.observation)
            assert float(reward) == float(theirs.reward)
            is_last = t == 5 if is_goal else t == 6
            assert (bool(terminated), bool(truncated)) == (is_last and is_goal, is_last and not is_goal)
            if is_last:
                break
    assert env.render is not None
    picture = env.render(jax.device_get(state), np.asarray(observation))
    assert (picture.shape, picture.dtype) == ((160, 160, 3), np.uint8)


@pytest.mark.parametrize("suite", ["octax", "pgx", "xminigrid"])
def test_every_listed_name_keeps_the_contract(suite: str) -> None:
    pytest.importorskip(suite)
    names = list_suite(suite)
    known = {"octax": "space_flight10", "pgx": "minatar-seaquest", "xminigrid": "MiniGrid-MemoryS8"}
    assert f"{suite}:{known[suite]}" in names
    for name in names:
        env = make_env(name)
        if not env.spec.has_action_mask:  # of those that have masks, the conformance suite takes care
            check_env(env, name)


def test_gymnaxs_names_are_listed_too() -> None:
    pytest.importorskip("gymnax")
    assert "gymnax:Breakout-MinAtar" in list_suite("gymnax")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("octax:pongg", {}, "octax has no environment 'pongg' .*`qfleet envs octax`.*Did you mean pong"),
        ("octax:pong", {"speed": 2}, "env_options must be options that octax:pong takes"),
        ("pgx:chess", {}, "pgx has no environment 'chess' for a single agent"),
        ("octax:pong", {"frame_skip": 0}, "frame_skip must be a whole number, at least 1, got 0"),
        ("pgx:2048", {"max_episode_steps": 0}, "max_episode_steps must be a whole number, at least 1, got 0"),
        ("xminigrid:MiniGrid-Empty-5x5", {"max_steps": 0}, "max_steps must be a whole number, at least 1, got 0"),
        ("xminigrid:XLand-MiniGrid-R1-9x9", {}, "xminigrid has no environment 'XLand-MiniGrid-R1-9x9'"),
        ("pgx:2048", {"size": 5}, "env_options must be options that pgx:2048 takes"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(name: str, options: dict[str, Any], message: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    with pytest.raises(ConfigError, match=message):
        make_env(name, **options)


@pytest.mark.parametrize("suite", ["gymnax", "octax", "pgx", "xminigrid"])
def test_a_missing_suite_names_the_command_that_adds_it(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, suite, None)
    monkeypatch.setitem(sys.modules, f"{suite}.environments", None)
    for use in (lambda: make_env(f"{suite}:pong"), lambda: list_suite(suite)):
        with pytest.raises(ConfigError, match=rf"need the package {suite} .*pip install 'qfleet\[{suite}\]'"):
            use()


def test_suites_have_backends_and_topologies_of_their_own() -> None:
    assert [backend_of(name) for name in ("octax:pong", "pgx:2048")] == ["octax", "pgx"]
    assert {default_topology(name) for name in ("octax:pong", "pgx:2048")} == {"fused"}
    with pytest.raises(
        ConfigError, match=r"suite must be one of gymnax, octax, pgx, xminigrid, got 'pgxx'.*Did you mean pgx"
    ):
        list_suite("pgxx")


def test_a_game_of_octax_is_drawn_as_its_newest_frame() -> None:
    env = made("octax:pong")
    assert env.render is not None
    state, observation = env.reset(jax.random.key(0))
    picture = env.render(state, np.asarray(observation))
    assert (picture.shape, picture.dtype) == ((256, 512, 3), np.uint8)
    np.testing.assert_array_equal(picture[::8, ::8, 0] > 0, observation[..., -1])


@pytest.mark.parametrize(
    ("name", "preset", "settings"),
    [
        ("octax:pong", "pqn", {"env_options": {"max_num_steps_per_episodes": 20}}),
        ("pgx:2048", "double_dqn", {"replay_capacity": 512, "warmup_env_steps": 64, "batch_size": 16}),
        ("xminigrid:MiniGrid-MemoryS8", "pqn_rnn", {"memory_size": 8, "env_options": {"max_steps": 20}}),
    ],
)
def test_a_short_training_runs(name: str, preset: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(name.partition(":")[0])
    sizes: dict[str, Any] = {"num_envs": 4, "torso": "mlp", "hidden_sizes": (16,), "env_steps": 256, **settings}
    if preset.startswith("pqn"):
        sizes |= {"rollout_length": 8, "num_minibatches": 2}
    config = qfleet.make_config(name, preset, run_dir=str(tmp_path / "run"), eval_episodes=2, **sizes)
    summary = qfleet.train(config)
    assert summary["env_steps"] == 256 and summary["learner_steps"] > 0
