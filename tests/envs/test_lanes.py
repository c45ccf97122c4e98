"""NEXT_STEP autoreset, worked by hand on a counting environment and compared with a plain loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.envs import cartpole
from qfleet.envs.in_graph import Lanes, StepKeys, draw_step_keys, init_lanes, step_lanes
from qfleet.envs.spec import EnvSpec, InGraphEnv, StepResult


def counting(time_limit: int | None = None) -> InGraphEnv:
    """Adds up the actions. The observation is [count, count]. Terminates at a count of 3 or more, truncates at 2.

    The reward is the new count, so that a reward tells which action was counted.
    """

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        return {"count": jnp.int32(0)}, jnp.zeros(2, jnp.int32)

    def step(state: Any, action: jax.Array, key: jax.Array) -> StepResult:
        count = state["count"] + action
        return StepResult({"count": count}, jnp.full(2, count), count.astype(jnp.float32), count >= 3, count == 2)

    spec = EnvSpec(
        name="counting",
        observation_shape=(2,),
        observation_dtype=np.dtype(np.int32),
        num_actions=8,
        time_limit=time_limit,
    )
    return InGraphEnv(spec, reset, step)


def play(env: InGraphEnv, actions: Any) -> Any:
    """Returns `(observation, final, reward, terminated, truncated)` of each row, for `[rows][lanes]` actions."""
    actions = jnp.asarray(actions)
    lanes = init_lanes(env, jax.random.key(0), jnp.arange(actions.shape[1]))

    def row(lanes: Lanes, x: tuple[jax.Array, StepKeys]) -> tuple[Lanes, Any]:
        after, step = step_lanes(env, lanes, *x)
        return after, (lanes.observation, lanes.final, *step)

    return jax.lax.scan(
        row, lanes, (actions, draw_step_keys(env, jax.random.key(1), actions.shape[0], jnp.arange(actions.shape[1])))
    )[1]


def at(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def test_the_final_observation_is_kept_and_the_row_after_it_starts_anew() -> None:
    observation, final, reward, terminated, truncated = play(counting(), [[1], [4], [7], [1], [1], [7], [1]])
    #                                            acts: 0->1, 1->5 terminates, 7 ignored, 0->1, 1->2 truncates, ignored
    assert observation[:, 0].tolist() == [[0, 0], [1, 1], [5, 5], [0, 0], [1, 1], [2, 2], [0, 0]]
    assert final[:, 0].tolist() == [False, False, True, False, False, True, False]
    assert reward[:, 0].tolist() == [1, 5, 0, 1, 2, 0, 1]
    assert terminated[:, 0].tolist() == [False, True, False, False, False, False, False]
    assert truncated[:, 0].tolist() == [False, False, False, False, True, False, False]


def test_a_lane_that_ends_leaves_its_neighbours_alone() -> None:
    observation, final, *_ = play(counting(), [[1, 0, 5], [0, 0, 1], [0, 1, 1]])
    assert observation[:, :, 0].T.tolist() == [[0, 1, 1], [0, 0, 0], [0, 5, 0]]
    assert final.T.tolist() == [[False] * 3, [False] * 3, [False, True, False]]


def test_the_time_limit_counts_steps_of_the_episode_not_rows() -> None:
    _, final, _, terminated, truncated = play(counting(time_limit=2), [[0]] * 8)
    #                                        two steps and a final row, again and again
    assert truncated[:, 0].tolist() == [False, True, False, False, True, False, False, True]
    assert final[:, 0].tolist() == [False, False, True, False, False, True, False, False]
    assert not terminated.any()


def test_termination_in_the_last_allowed_step_sets_both_flags() -> None:
    _, final, _, terminated, truncated = play(counting(time_limit=2), [[0], [3], [1]])
    assert terminated[:, 0].tolist() == [False, True, False]
    assert truncated[:, 0].tolist() == [False, True, False]
    assert final[:, 0].tolist() == [False, False, True]


def test_termination_before_the_time_limit_is_no_truncation() -> None:
    _, _, _, terminated, truncated = play(counting(time_limit=2), [[3], [0], [0], [0]])
    assert terminated[:, 0].tolist() == [True, False, False, False]
    assert truncated[:, 0].tolist() == [False, False, False, True]  # row 1 is final, the limit counts rows 2 and 3


def test_nothing_of_a_nan_state_survives_the_reset() -> None:
    """An environment may return anything when its final state is stepped. The row must not show it."""
    poisoned = counting()
    poisoned = poisoned._replace(
        step=lambda state, action, key: (result := counting().step(state, action, key))._replace(
            reward=jnp.where(state["count"] >= 3, jnp.nan, result.reward)
        )
    )
    _, _, reward, *_ = play(poisoned, [[3], [0], [1]])
    assert reward[:, 0].tolist() == [3, 0, 1]


def test_lanes_play_the_episodes_that_a_plain_loop_plays() -> None:
    """With the same draws and actions, compares every reward, flag and observation of 4 lanes over 200 rows."""
    env = cartpole.make()
    env = env._replace(spec=EnvSpec(**{**vars(env.spec), "time_limit": 25}))
    actions = np.random.default_rng(0).integers(2, size=(200, 4))
    rows = [np.asarray(x) for x in play(env, actions)]
    draws = draw_step_keys(env, jax.random.key(1), 200, jnp.arange(4))
    first = init_lanes(env, jax.random.key(0), jnp.arange(4))
    step = jax.jit(env.step)
    ends = set()
    for lane in range(4):
        state, observation = at(first.env_state, lane), first.observation[lane]
        ended, steps = False, 0
        for i in range(200):
            reward, terminated, truncated = 0.0, False, False
            np.testing.assert_allclose(rows[0][i, lane], observation, rtol=1e-4, atol=1e-5)
            assert rows[1][i, lane] == ended
            if ended:
                (state, observation), steps, ended = at(draws.fresh, i, lane), 0, False
            else:
                state, observation, reward, terminated, _ = step(state, actions[i, lane], draws.keys[i, lane])
                steps += 1
                truncated = steps == 25
                ended = bool(terminated or truncated)
                ends.add((bool(terminated), truncated))
            assert [x[i, lane] for x in rows[2:]] == [reward, terminated, truncated]
    assert {(True, False), (False, True)} <= ends  # both kinds of ending occurred


def test_a_lanes_draws_do_not_depend_on_how_many_lanes_there_are() -> None:
    env = cartpole.make()
    few, many = (draw_step_keys(env, jax.random.key(7), 3, jnp.arange(lanes)) for lanes in (2, 5))
    np.testing.assert_array_equal(few.fresh[1], many.fresh[1][:, :2])
    np.testing.assert_array_equal(jax.random.key_data(few.keys), jax.random.key_data(many.keys[:, :2]))
    few_lanes, many_lanes = (init_lanes(env, jax.random.key(7), jnp.arange(lanes)) for lanes in (2, 5))
    np.testing.assert_array_equal(few_lanes.observation, many_lanes.observation[:2])


def test_no_two_draws_are_alike() -> None:
    draws = draw_step_keys(cartpole.make(), jax.random.key(8), 16, jnp.arange(8))
    starts = np.asarray(draws.fresh[1]).reshape(-1, 4)
    assert len(np.unique(starts[:, 0])) == len(starts)
    assert len(np.unique(np.asarray(jax.random.key_data(draws.keys)).reshape(128, -1), axis=0)) == 128


@pytest.mark.parametrize("lanes", [1, 6])
def test_lanes_keep_shapes_and_dtypes_from_row_to_row(lanes: int) -> None:
    env = counting(time_limit=3)
    before = init_lanes(env, jax.random.key(0), jnp.arange(lanes))
    draws = jax.tree.map(lambda x: x[0], draw_step_keys(env, jax.random.key(1), 1, jnp.arange(lanes)))
    after, step = step_lanes(env, before, jnp.zeros(lanes, jnp.int32), draws)
    assert isinstance(after, Lanes)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert jax.tree.map(lambda x: x.dtype, before) == jax.tree.map(lambda x: x.dtype, after)
    assert [x.dtype for x in step] == [np.float32, bool, bool]
