"""A run's evaluations: whether one is due, how long episodes may get, what confirms a return, what is kept."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from qfleet.config import AgentConfig, FusedConfig, TrainConfig
from qfleet.runtime.evaluation import Episodes, never
from qfleet.runtime.records import Progress, Sum, make_progress
from qfleet.training.evaluation_rounds import CONFIRMING_EPISODES, EvaluationRounds

AGENT = AgentConfig(replay="none", num_minibatches=1)


def episodes_of(returns: Any, fingerprints: Any = None, steps: int = 10, num_cut: int = 0) -> Episodes:
    """Returns episodes `[seeds, episodes]` with these returns; all different unless fingerprints are given."""
    returns = np.asarray(returns, np.float32)
    numbers = np.arange(returns.size).reshape(returns.shape) if fingerprints is None else fingerprints
    was_cut = np.broadcast_to(np.arange(returns.shape[1]) < num_cut, returns.shape)
    return Episodes(returns, np.full(returns.shape, steps), np.broadcast_to(numbers, returns.shape), was_cut)


class Played:
    """A topology that evaluates to given episodes, in turn. An entry may be None: that evaluation is stopped."""

    def __init__(self, *evaluations: Episodes | None, env_steps: int = 100) -> None:
        self._evaluations = iter(evaluations)
        self.env_steps = env_steps
        self.limits: list[int | None] = []
        self.params, self.learner_steps = np.ones(2), 0

    def replay_measures(self) -> dict[str, float]:
        return {"replay_size": 7.0}

    def evaluate(self, num_episodes: int, batch: int, *, max_episode_steps: int | None, should_stop: Any) -> Any:
        self.limits.append(max_episode_steps)
        return next(self._evaluations)


def make(topology: Played, time_limit: int | None = None, **settings: Any) -> EvaluationRounds:
    config = TrainConfig(
        env="played", agent=AGENT, topology=FusedConfig(num_envs=4), env_steps=10**7, eval_episodes=4, **settings
    )
    return EvaluationRounds(config, topology, time_limit)  # type: ignore[arg-type]


def chunk(length: float | None, num_episodes: int = 2) -> Progress:
    lengths = Sum() if length is None else Sum(length * num_episodes, num_episodes)
    return make_progress(
        env_steps=100, learner_steps=1, train_seconds=1.0, new_env_steps=100, new_learner_steps=1,
        episode_return=lengths, episode_length=lengths, q_max=Sum(), loss=Sum(), td_error=Sum(), exploration=0.1,
    )  # fmt: skip


ONE_SEED = np.ones(1, bool)


@pytest.mark.parametrize(
    ("time_limit", "given", "lengths", "limit"),
    [
        (None, None, [], 1_000),
        (None, None, [None], 1_000),
        (None, None, [30.0], 1_000),
        (None, None, [400.0, 600.0], 5_000),
        (None, None, [400.0, None, 600.0], 5_000),
        (None, None, [5_000.0], 27_000),
        (None, 50, [400.0], 50),
        (500, None, [400.0], None),
        (500, 50, [400.0], 50),
    ],
)
def test_without_a_time_limit_an_episode_may_last_ten_mean_lengths_of_training_episodes(
    time_limit: int | None, given: int | None, lengths: list[float | None], limit: int | None
) -> None:
    topology = Played(episodes_of([[1.0] * 4]), env_steps=10**6)
    evaluations = make(topology, time_limit, eval_max_episode_steps=given)
    for length in lengths:
        evaluations.add(chunk(length))
    evaluations.evaluate(ONE_SEED, never)
    assert topology.limits == [limit]
    assert evaluations.summary["eval_episode_limit"] == limit


def test_the_limit_follows_the_training_episodes_of_the_last_period_or_stays_if_it_had_none() -> None:
    topology = Played(*[episodes_of([[1.0] * 4], steps=1)] * 3, env_steps=10**6)
    evaluations = make(topology)
    for length in (900.0, None, 200.0):
        evaluations.add(chunk(length))
        evaluations.evaluate(ONE_SEED, never)
    assert topology.limits == [9_000, 9_000, 2_000]


@pytest.mark.parametrize(
    ("env_steps", "limit"),
    [(4 * 1_199, None), (4 * 1_200, 1_200), (4 * 3_000, 3_000), (4 * 6_000, 6_000), (4 * 7_000, 6_000)],
)
def test_an_evaluation_takes_no_more_steps_than_training_and_waits_rather_than_cut_most_episodes(
    env_steps: int, limit: int | None
) -> None:
    """Training episodes have 600 steps, and four are played: it takes 2 to 10 times that, as far as affordable."""
    topology = Played(episodes_of([[1.0] * 4]), env_steps=env_steps)
    evaluations = make(topology)
    evaluations.add(chunk(600.0))
    evaluations.evaluate(ONE_SEED, never)
    assert topology.limits == ([] if limit is None else [limit])


def test_the_last_evaluation_takes_place_and_has_room_for_whole_episodes() -> None:
    topology = Played(episodes_of([[1.0] * 4]), env_steps=10**7)
    evaluations = make(topology)
    evaluations.restore(evaluations.saved | {"env_steps_taken": 1e9})
    evaluations.add(chunk(600.0))
    assert evaluations.evaluate(ONE_SEED, never)[0]
    assert topology.limits == [1_200]


def test_evaluations_wait_for_training_to_make_up_for_them(caplog: pytest.LogCaptureFixture) -> None:
    """Four episodes of 40 steps take 160: as many as training has taken at 160, and a few more than at 159."""
    topology = Played(*[episodes_of([[1.0] * 4], steps=40)] * 3)
    evaluations = make(topology)
    assert evaluations.evaluate(ONE_SEED, never)[0]
    topology.env_steps = 159
    assert evaluations.evaluate(ONE_SEED, never) == ({}, np.zeros(1, bool))
    assert "played has no time limit, and the evaluation of environment step 159 waits" in caplog.text
    assert evaluations.summary["eval_at_env_steps"] == 100  # the newest one is kept
    topology.env_steps = 160
    assert evaluations.evaluate(ONE_SEED, never)[0]


def test_evaluations_with_a_time_limit_never_wait() -> None:
    topology = Played(*[episodes_of([[1.0] * 4], steps=400)] * 3)
    evaluations = make(topology, time_limit=500)
    assert all(evaluations.evaluate(ONE_SEED, never)[0] for _ in range(3))


FRESH = np.arange(100, 100 + CONFIRMING_EPISODES)


@pytest.mark.parametrize(
    ("confirming", "fingerprints", "is_reached", "new_episodes"),
    [(5.0, FRESH, True, 100), (4.9, FRESH, False, None), (5.0, FRESH % 10 + 100, True, 10), (5.0, FRESH % 2, True, 0)],
    ids=["fresh episodes", "refuted", "ten different ones", "the same again"],
)
def test_it_is_known_how_many_new_episodes_confirm_a_return(
    confirming: float, fingerprints: np.ndarray, is_reached: bool, new_episodes: int | None
) -> None:
    topology = Played(episodes_of([[5.0] * 4]), episodes_of([[confirming] * CONFIRMING_EPISODES], fingerprints))
    evaluations = make(topology, time_limit=500, stop_return=5.0)
    _, reached = evaluations.evaluate(ONE_SEED, never)
    assert reached.tolist() == [is_reached]
    assert evaluations.summary["confirmed_by_new_episodes"] == [new_episodes]
    assert len(evaluations.summary["eval_returns"][0]) == CONFIRMING_EPISODES


def test_only_seeds_that_have_not_reached_the_return_are_confirmed() -> None:
    topology = Played(episodes_of([[5.0] * 4, [5.0] * 4]), episodes_of([[5.0] * 100] * 2))
    evaluations = make(topology, time_limit=500, stop_return=5.0, num_seeds=2)
    assert evaluations.evaluate(np.array([False, True]), never)[1].tolist() == [False, True]


def test_too_few_episodes_confirm_nothing() -> None:
    topology = Played(episodes_of([[5.0] * 3]))
    assert not make(topology, time_limit=500, stop_return=5.0).evaluate(ONE_SEED, never)[1].any()


@pytest.mark.parametrize("nothing", [None, episodes_of(np.zeros((1, 0)))], ids=["stopped", "all failed"])
def test_an_evaluation_without_a_result_leaves_the_one_before(nothing: Episodes | None) -> None:
    topology = Played(episodes_of([[2.0] * 4], num_cut=3), nothing)
    evaluations = make(topology, time_limit=500)
    fields, _ = evaluations.evaluate(ONE_SEED, never)
    assert fields == {
        "eval_returns": ((2.0,) * 4,), "eval_num_different": 4, "eval_num_cut": 3, "measures": {"replay_size": 7.0}
    }  # fmt: skip
    assert dataclasses.replace(chunk(3.0), **fields).eval_return_mean == 2.0
    before = evaluations.summary
    assert evaluations.evaluate(ONE_SEED, never) == ({}, np.zeros(1, bool))
    assert evaluations.summary == before


def test_a_stop_while_a_return_is_confirmed_confirms_nothing() -> None:
    topology = Played(episodes_of([[5.0] * 4]), None)
    fields, reached = make(topology, time_limit=500, stop_return=5.0).evaluate(ONE_SEED, never)
    assert fields["eval_returns"] == ((5.0,) * 4,) and not reached.any()


def test_a_checkpoint_keeps_all_that_later_evaluations_depend_on() -> None:
    first = make(Played(episodes_of([[2.0] * 4], steps=40)))
    first.add(chunk(470.0))
    first.evaluate(ONE_SEED, never)
    first.add(chunk(450.0))
    topology = Played(episodes_of([[2.0] * 4]))
    second = make(topology)
    second.restore(json.loads(json.dumps(first.saved)))
    assert second.summary == first.summary and second.saved == first.saved
    topology.env_steps = 159
    assert second.evaluate(ONE_SEED, never) == ({}, np.zeros(1, bool))
    topology.env_steps = 10**6
    second.evaluate(ONE_SEED, never)
    assert topology.limits == [4_500]


def test_a_run_without_an_evaluation_says_so() -> None:
    summary = make(Played(), eval_exploration=0.01).summary
    assert summary.pop("eval_exploration") == 0.01
    assert summary.pop("confirmed_by_new_episodes") == [None]
    assert set(summary.values()) == {None}
