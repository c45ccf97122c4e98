"""Returns of greedy episodes: each complete episode counts once."""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.core.types import EnvSpec, Params
from qfleet.envs.host import HostStep
from qfleet.envs.registry import make_env
from qfleet.runtime.evaluation import (
    Episodes,
    InPieces,
    are_over,
    begin_episodes,
    greedy_returns,
    host_greedy_returns,
    play_on,
)


def constant_q(params: Params, obs: jax.Array) -> jax.Array:
    return jnp.broadcast_to(params, (obs.shape[0], len(params)))


def test_an_episode_counts_up_to_its_time_limit() -> None:
    env = probes.time_limit(steps=5)
    returns = greedy_returns(env, constant_q, jnp.zeros(1), jax.random.key(0), 3)
    np.testing.assert_array_equal(returns, [5.0, 5.0, 5.0])


def test_a_step_after_the_end_does_not_count() -> None:
    env = probes.delayed_reward()  # if it were stepped beyond its end, it would continue to pay 1
    returns = greedy_returns(env, constant_q, jnp.zeros(1), jax.random.key(0), 4)
    np.testing.assert_array_equal(returns, np.ones(4))


def test_actions_are_the_greedy_ones() -> None:
    env = probes.action_reward()
    for q, expected in (([1.0, 0.0], -1.0), ([0.0, 1.0], 1.0)):
        returns = greedy_returns(env, constant_q, jnp.array(q), jax.random.key(0), 2)
        np.testing.assert_array_equal(returns, [expected, expected])


def test_episodes_of_different_lengths_each_count_their_own_steps() -> None:
    env = make_env("CartPole-v1")
    returns = np.asarray(greedy_returns(env, constant_q, jnp.array([0.0, 1.0]), jax.random.key(0), 32))
    assert len(set(returns.tolist())) > 1
    assert np.all((returns >= 8) & (returns <= 11))  # pushed one way, the pole falls within 8 to 11 steps


def test_the_key_decides_the_episodes() -> None:
    env = probes.observation_reward()
    first, again, other = (
        np.asarray(greedy_returns(env, constant_q, jnp.zeros(1), jax.random.key(i), 64)) for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


class CountedLanes:
    """Host lanes whose episodes last as long as `lengths` says and pay 1 a step. `fails(row, lane)` says which fail."""

    def __init__(
        self, num_lanes: int, lengths: Iterator[int], fails: Callable[[int, int], bool] = lambda row, lane: False
    ) -> None:
        self._lengths, self._fails, self.row = lengths, fails, 0
        self._left = [next(lengths) for _ in range(num_lanes)]

    def reset(self, seed: int) -> np.ndarray:
        return np.zeros((len(self._left), 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        assert action.shape == (len(self._left),)

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


def host_returns(lanes: CountedLanes, num_episodes: int, time_limit: int | None = None) -> list[float]:
    spec = EnvSpec(
        name="counted", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=1,
        time_limit=time_limit,
    )  # fmt: skip
    return host_greedy_returns(lanes, spec, lambda view: jnp.zeros(len(view), int), num_episodes, seed=0).tolist()


def test_the_host_counts_the_episodes_that_start_first_not_those_that_end_first() -> None:
    lanes = CountedLanes(2, iter([9, 2, 3, 4, 5, 6, 7]))
    # The second lane plays 2, 3 and 4 steps while the first plays its 9. The fourth episode to start has 4 steps.
    assert host_returns(lanes, 4) == [9, 2, 3, 4]
    assert host_returns(CountedLanes(3, iter([5, 6, 7, 8, 9, 9])), 2) == [5, 6]


def test_the_mean_of_the_episodes_that_the_host_counts_favours_neither_long_nor_short() -> None:
    rng = np.random.default_rng(0)
    lengths = iter(lambda: int(rng.choice([1, 30])), None)
    means = [np.mean(host_returns(CountedLanes(8, lengths), 20)) for _ in range(400)]
    assert np.mean(means) == pytest.approx(15.5, abs=4 * 14.5 / np.sqrt(20 * 400))


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


def test_episodes_played_in_pieces_are_those_played_at_once() -> None:
    env = probes.random_walk()
    key, params = jax.random.key(3), jnp.zeros(1)
    whole = greedy_returns(env, constant_q, params, key, 6)
    asked = []

    def play(params: jax.Array, episodes: Episodes, until: np.int32) -> tuple[Episodes, jax.Array, jax.Array]:
        asked.append(int(until))
        episodes = play_on(env, constant_q, params, episodes, until)
        return episodes, episodes.returns, are_over(env, episodes)

    pieces = InPieces(lambda: begin_episodes(env, key, 6), play)
    pieces._length = 1
    np.testing.assert_array_equal(pieces.returns(params, (), lambda: None), whole)
    assert len(asked) > 1 and asked[0] == 1


def test_an_evaluation_in_pieces_can_be_left_between_them() -> None:
    env, num_checks = probes.random_walk(), 0

    def stop_at_second() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 2:
            raise InterruptedError

    def play(params: jax.Array, episodes: Episodes, until: np.int32) -> tuple[Episodes, jax.Array, np.ndarray]:
        return episodes, episodes.returns, np.array(False)

    with pytest.raises(InterruptedError):
        InPieces(lambda: begin_episodes(env, jax.random.key(0), 2), play).returns({}, (), stop_at_second)
