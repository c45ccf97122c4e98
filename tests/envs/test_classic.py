"""The classic environments, compared with Gymnasium's own, which compute in float64."""

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.envs import acrobot, cartpole, mountain_car
from qfleet.envs.in_graph import Lanes, StepKeys, draw_step_keys, init_lanes, step_lanes
from qfleet.envs.spec import InGraphEnv, StepResult

Case = tuple[InGraphEnv, Any, float]

# Name, module, lowest and highest state to try, and tolerance for the rounding of one step. The states go beyond what
# episodes reach, so that limits are passed. At high speeds, Acrobot's Runge-Kutta step magnifies rounding.
CLASSIC = [
    ("CartPole-v1", cartpole, [-3.0, -4.0, -0.3, -4.0], [3.0, 4.0, 0.3, 4.0], 2e-6),
    ("Acrobot-v1", acrobot, [-3.1, -3.1, -12.5, -28.0], [3.1, 3.1, 12.5, 28.0], 2e-3),
    ("Acrobot-v1", acrobot, [-3.1, -3.1, -5.0, -8.0], [3.1, 3.1, 5.0, 8.0], 2e-5),
    ("MountainCar-v0", mountain_car, [-1.2, -0.07], [0.6, 0.07], 2e-7),
]


@pytest.fixture(params=[CLASSIC[i] for i in (0, 2, 3)], ids=lambda case: case[0])
def case(request: pytest.FixtureRequest) -> Case:
    """Returns `(our environment, Gymnasium's, tolerance)`."""
    name, module, _, _, tolerance = request.param
    return module.make(), made(name), tolerance


def made(name: str) -> gymnasium.Env[Any, Any]:
    reference = gymnasium.make(name)
    reference.reset(seed=0)
    return reference


def gymnasium_step(reference: Any, state: np.ndarray, action: int) -> tuple[np.ndarray, float, bool]:
    """Steps Gymnasium's environment from a state of ours."""
    reference.unwrapped.state = np.array(state, np.float64)
    reference.unwrapped.steps_beyond_terminated = None
    observation, reward, terminated, _, _ = reference.unwrapped.step(int(action))
    return observation, reward, terminated


def assert_steps_agree(
    env: InGraphEnv, reference: Any, tolerance: float, states: np.ndarray, actions: np.ndarray
) -> StepResult:
    """Compares one step from each state; `states` is `[count, parts]`, `actions` `[count]`."""
    ours = jax.jit(jax.vmap(env.step, (0, 0, None)))(jnp.asarray(states), jnp.asarray(actions), jax.random.key(0))
    theirs = [gymnasium_step(reference, state, action) for state, action in zip(states, actions, strict=True)]
    observations, rewards, terminated = map(np.array, zip(*theirs, strict=True))
    np.testing.assert_allclose(ours.observation, observations, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(ours.reward, rewards)
    np.testing.assert_array_equal(ours.terminated, terminated)
    assert not ours.truncated.any()
    return ours


@pytest.mark.parametrize(("name", "module", "low", "high", "tolerance"), CLASSIC)
def test_a_step_from_any_state_is_gymnasiums(
    name: str, module: Any, low: list[float], high: list[float], tolerance: float
) -> None:
    env = module.make()
    rng = np.random.default_rng(0)
    states = rng.uniform(low, high, (2_000, len(low))).astype(np.float32)
    actions = rng.integers(env.spec.num_actions, size=2_000)
    ours = assert_steps_agree(env, made(name), tolerance, states, actions)
    assert 0 < ours.terminated.sum() < 2_000


def test_every_step_of_long_rollouts_is_gymnasiums(case: Case) -> None:
    """Compares states that episodes pass through, starting from our resets. Random actions are held for a while."""
    env, reference, tolerance = case
    rng = np.random.default_rng(1)
    actions = rng.integers(env.spec.num_actions, size=(60, 8)).repeat(5, axis=0)
    state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(2), 8))

    def advance(state: Any, action: jax.Array) -> tuple[Any, Any]:
        return jax.vmap(env.step, (0, 0, None))(state, action, jax.random.key(0)).state, state

    _, states = jax.jit(lambda state: jax.lax.scan(advance, state, jnp.asarray(actions)))(state)
    states = np.asarray(states).reshape(-1, state.shape[-1])
    assert_steps_agree(env, reference, tolerance, states, actions.reshape(-1))


def test_an_episode_stays_beside_gymnasiums_without_correction(case: Case) -> None:
    """Rounding must not pile up into another trajectory over 30 steps."""
    env, reference, _ = case
    state, _ = env.reset(jax.random.key(3))
    reference.unwrapped.state = np.array(state, np.float64)
    step = jax.jit(env.step)
    for i in range(30):
        action = (i // 2) % env.spec.num_actions
        state, observation, _, terminated, _ = step(state, jnp.int32(action), jax.random.key(0))
        theirs, _, their_terminated, _, _ = reference.unwrapped.step(action)
        np.testing.assert_allclose(observation, theirs, atol=1e-4)
        assert terminated == their_terminated
        if terminated:
            break


def test_episodes_start_where_gymnasiums_do(case: Case) -> None:
    """Compares bounds and means of 4,000 first observations."""
    env, reference, _ = case
    _, ours = jax.vmap(env.reset)(jax.random.split(jax.random.key(4), 4_000))
    theirs = np.stack([reference.unwrapped.reset(seed=i)[0] for i in range(4_000)])
    spread = np.maximum(np.ptp(theirs, axis=0), 1e-6)
    for statistic in (np.min, np.max, np.mean):
        np.testing.assert_allclose(
            (statistic(np.asarray(ours), axis=0) - statistic(theirs, axis=0)) / spread, 0.0, atol=0.03
        )
    np.testing.assert_allclose(np.std(ours, axis=0), np.std(theirs, axis=0), rtol=0.05, atol=1e-6)


def test_the_spec_is_gymnasiums(case: Case) -> None:
    env, reference, _ = case
    assert env.spec.name == reference.spec.id
    assert env.spec.observation_shape == reference.observation_space.shape
    assert env.spec.observation_dtype == reference.observation_space.dtype
    assert env.spec.num_actions == reference.action_space.n
    assert env.spec.time_limit == reference.spec.max_episode_steps


def hold_out(name: str, observation: jax.Array) -> jax.Array:
    """Returns an action that keeps an episode from terminating, so that only the time limit ends it."""
    if name == "CartPole-v1":
        position, velocity, angle, angular_velocity = observation
        return (angle + 0.5 * angular_velocity + 0.02 * position + 0.05 * velocity > 0).astype(jnp.int32)
    return jnp.int32(1)


def at_first_lane(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def test_the_time_limit_truncates_in_gymnasiums_step(case: Case) -> None:
    env, reference, _ = case
    limit = env.spec.time_limit
    assert limit is not None

    def row(lanes: Lanes, draws: StepKeys) -> tuple[Lanes, Any]:
        action = hold_out(env.spec.name, lanes.observation[0])[None]
        after, step = step_lanes(env, lanes, action, draws)
        return after, (lanes.env_state, action[0], at_first_lane(step), after.final[0])

    lanes = init_lanes(env, jax.random.key(5), jnp.arange(1))
    draws = draw_step_keys(env, jax.random.key(6), limit + 2, jnp.arange(1))
    _, (states, actions, ours, final) = jax.jit(lambda lanes: jax.lax.scan(row, lanes, draws))(lanes)
    states, actions, ours = jax.tree.map(np.asarray, (states[:, 0], actions, ours))

    for i in range(limit):
        # Set to our state at every step, because float32 and float64 would drift apart on the way.
        reference.unwrapped.state = states[i].astype(np.float64)
        _, _, terminated, truncated, _ = reference.step(actions[i])
        assert (ours.terminated[i], ours.truncated[i]) == (terminated, truncated) == (False, i == limit - 1)
    # The row with the final observation yields nothing. The row after it belongs to a new episode.
    assert final[-3:].tolist() == [True, False, False]
    assert ours.reward[-2] == 0 and ours.reward[-1] != 0
