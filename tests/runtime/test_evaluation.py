"""Episodes of an evaluation: each complete episode counts once, and those that repeat another are known."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.core.memory import MemoryState
from qfleet.core.types import EnvSpec, Params
from qfleet.envs.host import HostStep
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv, StepResult
from qfleet.policy import Policy
from qfleet.runtime import evaluation
from qfleet.runtime.evaluation import Episodes, EvaluationOptions, Pieces, make_evaluation
from qfleet.runtime.host_evaluation import HostAction, play_host_episodes

DISCOUNT = 0.5


def constant_q(params: Params, obs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(params, (obs.shape[0], len(params)))


def play(
    env: InGraphEnv, params: Any, num_episodes: int, seed: int = 0, exploration: float = 0.0, **more: Any
) -> Episodes | None:

    def values(params: Params, memory: MemoryState) -> tuple[jax.Array, MemoryState, tuple[jax.Array]]:
        return constant_q(params, memory.view), memory, (jnp.abs(memory.view.reshape(len(memory.view), -1)),)

    player = probes.linear_player(env.spec)._replace(values=values)
    functions = make_evaluation(env, player, num_episodes, exploration, discount=DISCOUNT)
    key, first, step = jax.random.key(seed), jnp.uint32(0), jax.jit(functions.play)
    return Pieces().play(
        lambda: functions.begin(key, first),
        lambda *further: step(jnp.asarray(params), key, first, *further),
        env.spec,
        **{"max_episode_steps": None} | more,
    )


def episodes_of(env: InGraphEnv, params: Any, num_episodes: int, **more: Any) -> Episodes:
    episodes = play(env, params, num_episodes, **more)
    assert episodes is not None
    return episodes


def test_an_episode_counts_up_to_its_time_limit() -> None:
    episodes = episodes_of(probes.time_limit(steps=5), [0.0], 3)
    np.testing.assert_array_equal(episodes.returns, [5.0, 5.0, 5.0])
    np.testing.assert_array_equal(episodes.lengths, [5, 5, 5])
    assert not episodes.was_cut.any()


def test_a_step_after_the_end_does_not_count() -> None:
    env = probes.delayed_reward()  # if it were stepped beyond its end, it would continue to pay 1
    episodes = episodes_of(env, [0.0], 4)
    np.testing.assert_array_equal(episodes.returns, np.ones(4))
    np.testing.assert_array_equal(episodes.lengths, np.full(4, 2))


def test_actions_are_the_greedy_ones() -> None:
    env = probes.action_reward()
    for q, expected in (([1.0, 0.0], -1.0), ([0.0, 1.0], 1.0)):
        np.testing.assert_array_equal(episodes_of(env, q, 2).returns, [expected, expected])


def test_episodes_of_different_lengths_each_count_their_own_steps() -> None:
    episodes = episodes_of(make_env("CartPole-v1"), [0.0, 1.0], 32)
    assert len(set(episodes.returns.tolist())) > 1
    assert np.all((episodes.returns >= 8) & (episodes.returns <= 11))  # pushed one way, the pole falls within 11 steps
    np.testing.assert_array_equal(episodes.lengths, episodes.returns)
    assert episodes.num_different() == 32


def test_the_key_decides_the_episodes() -> None:
    env = probes.observation_reward()
    first, again, other = (episodes_of(env, [0.0], 64, seed=seed).returns for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_episodes_with_the_same_observations_and_rewards_are_one_and_the_same() -> None:
    assert episodes_of(probes.time_limit(steps=5), [0.0], 8).num_different() == 1
    assert episodes_of(probes.observation_reward(), [0.0], 64).num_different() == 2


def test_episodes_that_differ_in_their_rewards_alone_are_different() -> None:
    """With half of the actions random, the reward is -1 or 1 at one observation."""
    assert episodes_of(probes.action_reward(), [1.0, 0.0], 64, exploration=0.5).num_different() == 2


def test_episodes_that_differ_in_one_number_of_one_observation_are_different() -> None:
    """The environment shows for three steps 0 or, once, a number that depends on the episode; it pays nothing."""
    spec = EnvSpec(
        name="one-number", observation_shape=(2, 3), observation_dtype=np.dtype(np.uint8), num_actions=1, time_limit=3
    )

    def step(state: tuple, action: jax.Array, key: jax.Array) -> StepResult:
        time, number = state
        shown = jnp.zeros((2, 3), jnp.uint8).at[1, 2].set(jnp.where(time == 1, number, 0).astype(jnp.uint8))
        return StepResult((time + 1, number), shown, jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    def reset(key: jax.Array) -> tuple:
        return (jnp.int32(0), jax.random.randint(key, (), 0, 4)), jnp.zeros((2, 3), jnp.uint8)

    assert episodes_of(InGraphEnv(spec, reset, step), [0.0], 64).num_different() == 4


def test_episodes_are_counted_as_new_only_if_an_earlier_evaluation_has_not_had_them() -> None:
    env = probes.random_walk(frame_stack=1)
    first, second = (episodes_of(env, [0.0, 1.0], 8, seed=seed) for seed in (0, 1))
    assert first.num_different(first) == 0
    assert second.num_different(first) == second.num_different() == 8
    seeds = jax.tree.map(lambda *parts: np.stack(parts), first, second)
    one_seed_twice = jax.tree.map(lambda *parts: np.stack(parts), first, first)
    np.testing.assert_array_equal(seeds.num_different(one_seed_twice), [0, 8])


def test_exploration_is_the_probability_of_a_random_action() -> None:
    returns = episodes_of(probes.action_reward(), [1.0, 0.0], 4000, exploration=0.2).returns
    assert np.mean(returns == 1.0) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 4000))


@pytest.mark.parametrize(
    ("time_limit", "max_episode_steps", "steps", "is_cut"),
    [(5, None, 5, False), (5, 9, 5, False), (5, 5, 5, False), (5, 3, 3, True), (None, 40, 40, True)],
)
def test_what_the_evaluation_itself_cuts_is_said(
    time_limit: int | None, max_episode_steps: int | None, steps: int, is_cut: bool
) -> None:
    env = probes.time_limit(5) if time_limit else probes.nan_reward(at_step=100)
    episodes = episodes_of(env, [0.0], 2, max_episode_steps=max_episode_steps)
    np.testing.assert_array_equal(episodes.lengths, [steps] * 2)
    np.testing.assert_array_equal(episodes.returns, [steps] * 2)
    np.testing.assert_array_equal(episodes.was_cut, [is_cut] * 2)


def test_the_discounted_return_of_an_episode_that_terminates_is_that_of_its_rewards() -> None:
    episodes = episodes_of(probes.delayed_reward(), [3.0], 2)
    np.testing.assert_array_equal(episodes.first_values, [3.0] * 2)
    np.testing.assert_array_equal(episodes.discounted_returns, [0.5] * 2)
    np.testing.assert_array_equal(episodes.has_terminated, [True] * 2)


@pytest.mark.parametrize(("max_episode_steps", "expected"), [(None, 1 + 0.5 + 0.25 + 0.125 + 3 / 16), (2, 1 + 3 / 2)])
def test_the_discounted_return_of_another_episode_ends_with_a_value(
    max_episode_steps: int | None, expected: float
) -> None:
    """It pays 1 in each step. The value of the last observation that was acted on, 3, takes the place of the rest."""
    episodes = episodes_of(probes.time_limit(steps=5), [3.0], 2, max_episode_steps=max_episode_steps)
    np.testing.assert_array_equal(episodes.discounted_returns, [expected] * 2)
    np.testing.assert_array_equal(episodes.has_terminated, [False] * 2)


def test_units_are_measured_over_all_observations_up_to_the_ends_of_episodes() -> None:
    """The units here are the observation itself, `[position, noise]`. There is no noise in the first one.

    In the first observation alone, one of two units is dormant.
    """
    env = probes.random_walk(frame_stack=1)
    np.testing.assert_array_equal(episodes_of(env, [0.0], 4, max_episode_steps=1).dormant_fractions, [0.5] * 4)
    np.testing.assert_array_equal(episodes_of(env, [0.0], 4).dormant_fractions, [0.0] * 4)


def test_the_lengths_of_the_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env("CartPole-v1")
    monkeypatch.setattr(evaluation, "FIRST_PIECE_STEPS", 1000)
    whole = episodes_of(env, [0.0, 1.0], 16, exploration=0.3)
    monkeypatch.setattr(evaluation, "FIRST_PIECE_STEPS", 1)
    for mine, other in zip(episodes_of(env, [0.0, 1.0], 16, exploration=0.3), whole, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_compiled_evaluation_hears_a_request_to_stop_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "FIRST_PIECE_STEPS", 1)
    answers = iter([False, True])  # it isn't asked a third time
    assert play(probes.nan_reward(at_step=100), [0.0], 2, should_stop=lambda: next(answers)) is None


def test_more_episodes_than_are_played_at_once_are_the_same_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    env = probes.random_walk(frame_stack=2)
    network = probes.linear_network(env.spec)
    policy = Policy(env, network, network.init(jax.random.key(1)), "", EvaluationOptions(exploration=0.1))
    at_once = policy.play_episodes(10, seed=3)
    monkeypatch.setattr("qfleet.runtime.policy_evaluation.MAX_TOGETHER", 4)
    for mine, other in zip(policy.play_episodes(10, seed=3), at_once, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


class CountedLanes:
    """Host lanes whose episodes last as long as `lengths` says and pay 1 a step. `fails(row, lane)` says which fail."""

    def __init__(
        self, num_lanes: int, lengths: Iterator[int], fails: Callable[[int, int], bool] = lambda row, lane: False
    ) -> None:
        self._lengths, self._fails, self.row = lengths, fails, 0
        self._left = [next(lengths) for _ in range(num_lanes)]
        self.actions: list[np.ndarray] = []

    def reset(self, seed: int) -> np.ndarray:
        return np.zeros((len(self._left), 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        assert action.shape == (len(self._left),)
        self.actions.append(action)

    def recv(self) -> HostStep:
        reward, terminated, failed = (np.zeros(len(self._left), kind) for kind in (np.float32, bool, bool))
        for lane in range(len(self._left)):
            failed[lane] = self._fails(self.row, lane)
            if failed[lane] or self._left[lane] == 0:
                self._left[lane] = next(self._lengths)
            else:
                self._left[lane] -= 1
                reward[lane], terminated[lane] = 1, self._left[lane] == 0
        self.row += 1
        assert self.row < 50_000, "the evaluation never ends"
        return HostStep(self.reset(0), reward, terminated, np.zeros_like(terminated), failed)

    def close(self) -> None:
        pass


def play_host(lanes: CountedLanes, num_episodes: int, time_limit: int | None = None, **more: Any) -> Episodes | None:
    spec = EnvSpec(
        name="counted", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=4,
        time_limit=time_limit,
    )  # fmt: skip

    def act(memory: MemoryState) -> HostAction:
        num_lanes = len(memory.view)
        return HostAction(jnp.zeros(num_lanes, int), jnp.full(num_lanes, 3.0), memory, (jnp.array([0.0, 1.0]),))

    player = probes.linear_player(spec)
    return play_host_episodes(lanes, spec, player, act, num_episodes, 0, discount=DISCOUNT, **more)


def host_returns(lanes: CountedLanes, num_episodes: int, time_limit: int | None = None) -> list[float]:
    episodes = play_host(lanes, num_episodes, time_limit)
    assert episodes is not None
    return episodes.returns.tolist()


def test_the_host_counts_the_episodes_that_start_first_not_those_that_end_first() -> None:
    lanes = CountedLanes(2, iter([9, 2, 3, 4, 5, 6, 7]))
    # The second lane plays 2, 3 and 4 steps while the first plays its 9. The fourth episode to start has 4 steps.
    assert host_returns(lanes, 4) == [9, 2, 3, 4]
    assert host_returns(CountedLanes(3, iter([5, 6, 7, 8, 9, 9])), 2) == [5, 6]


def test_the_mean_of_the_episodes_that_the_host_counts_favours_neither_long_nor_short() -> None:
    rng = np.random.default_rng(0)
    lengths = iter(lambda: int(rng.choice([1, 30])), None)
    means = [np.mean(host_returns(CountedLanes(8, lengths), 20)) for _ in range(40)]
    assert np.mean(means) == pytest.approx(15.5, abs=4 * 14.5 / np.sqrt(20 * 40))


def test_an_episode_that_fails_does_not_count_and_the_next_to_start_does() -> None:
    lanes = CountedLanes(2, iter([5, 5, 1, 2, 3]), fails=lambda row, lane: (row, lane) == (2, 1))
    assert host_returns(lanes, 3) == [5, 1, 2]


@pytest.mark.parametrize("length", [100, 600, 990])
@pytest.mark.parametrize("moves", [0, 1, 3])
def test_evaluation_ends_however_failures_and_episodes_fall_together(length: int, moves: int) -> None:
    """Two workers have 8 lanes each. Every 125 rows one lane of each fails: always the same lane, or each in turn."""

    def fails(row: int, lane: int) -> bool:
        return row % 125 == 124 and lane % 8 == (row // 125) * moves % 8

    assert host_returns(CountedLanes(16, itertools.repeat(length), fails), 20) == [length] * 20


def test_an_endless_episode_is_cut_and_its_rest_counts_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfleet.runtime.evaluation.MAX_EPISODE_STEPS", 10)
    assert host_returns(CountedLanes(2, itertools.repeat(1000)), 5) == [10] * 5


def test_an_evaluation_that_gets_too_few_whole_episodes_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Episodes last 10 steps. One is complete before failures in every third row have cost ten."""
    lanes = CountedLanes(2, itertools.repeat(10), fails=lambda row, lane: row % 3 == 2 and (lane == 1 or row > 12))
    assert host_returns(lanes, 3) == [10]
    assert "lost 10 episodes to environments that failed, and was given up with 1 whole ones of 3" in caplog.text


def test_the_host_counts_different_episodes_and_those_that_it_cuts() -> None:
    episodes = play_host(CountedLanes(2, iter([3, 40, 4, 3, 4, 9, 9, 9, 9])), 5, max_episode_steps=10)
    assert episodes is not None
    assert episodes.lengths.tolist() == episodes.returns.tolist() == [3, 10, 4, 3, 10]  # the rest of 40 counts, too
    assert episodes.was_cut.tolist() == [False, True, False, False, True]
    assert episodes.num_different() == 3  # of 3, 4 and 10 steps


def test_the_host_measures_values_and_discounted_returns_of_every_episode() -> None:
    """An episode of two steps terminates; the rest of four steps is an episode of its own, and terminates too."""
    episodes = play_host(CountedLanes(2, iter([2, 5, 1, 9, 9, 9])), 4, max_episode_steps=3)
    assert episodes is not None
    assert episodes.lengths.tolist() == [2, 3, 1, 2]
    assert episodes.has_terminated.tolist() == [True, False, True, True]
    assert episodes.first_values.tolist() == [3.0] * 4
    assert episodes.discounted_returns.tolist() == [1.5, 1 + 0.5 + 3 / 4, 1.0, 1.5]
    assert episodes.dormant_fractions.tolist() == [0.5] * 4


def test_an_environment_that_ends_at_its_time_limit_is_not_cut() -> None:
    episodes = play_host(CountedLanes(2, itertools.repeat(1000)), 2, time_limit=7)
    assert episodes is not None
    assert episodes.lengths.tolist() == [7, 7] and not episodes.was_cut.any()


def test_the_host_takes_random_actions_with_the_probability_of_exploration() -> None:
    lanes = CountedLanes(4, itertools.repeat(1000))
    play_host(lanes, 4, exploration=0.2)
    actions = np.stack(lanes.actions)
    share = np.array([np.mean(actions == action) for action in range(4)])
    np.testing.assert_allclose(share[1:], 0.05, atol=4 * np.sqrt(0.05 / actions.size))
    assert np.any(actions[:, 0] != actions[:, 1])  # each lane has its own random numbers
    greedy = CountedLanes(4, itertools.repeat(10))
    play_host(greedy, 4)
    assert not np.any(greedy.actions)


def test_a_host_evaluation_hears_a_request_to_stop_before_every_step() -> None:
    lanes = CountedLanes(2, itertools.repeat(1000))
    assert play_host(lanes, 2, should_stop=lambda: lanes.row == 3) is None
    assert lanes.row == 3
