"""What a run notes down about itself: evaluations, falls, divergence, and the parts of its end."""

import json
import logging
from typing import Any

import numpy as np
import pytest

from qfleet.runtime.records import make_progress, sum_of
from qfleet.training.outcome import Closing, DivergenceCheck, Evaluations, evaluation_of


def noted(*means: float, spread: float = 0.0) -> Evaluations:
    """Returns the evaluations after these means, each of which its fresh episodes confirm."""
    evaluations = Evaluations()
    for i, mean in enumerate(means):
        evaluations.newest = evaluation_of(100 * (i + 1), np.array([[mean - spread, mean, mean + spread, mean]]))
        if evaluations.is_better(evaluations.newest):
            evaluations.best = evaluations.newest
    return evaluations


def test_a_fall_far_below_the_best_is_said_and_one_within_chance_is_not() -> None:
    assert "133.0, well below the best one, 500.0 at environment step 200" in str(noted(20.0, 500.0, 133.0).fall())
    assert noted(20.0, 500.0, 499.0).fall() is None, "too little"
    assert noted(20.0, 500.0, 300.0, spread=400.0).fall() is None, "the episodes differ by more than that"
    assert noted(-200.0, -96.0, -180.0).fall() is not None, "returns may be negative"
    assert noted(20.0, 500.0).fall() is None
    assert Evaluations().fall() is None


def test_the_best_evaluation_survives_a_checkpoint() -> None:
    before, after, empty = noted(20.0, 500.0, 133.0), Evaluations(), Evaluations()
    after.restore(json.loads(json.dumps(before.saved(), allow_nan=False)))
    assert after.summary() == before.summary() == {"best_eval_at_env_steps": 200, "best_eval_return_mean": 500.0}
    assert after.fall() == before.fall()
    empty.restore(empty.saved())
    assert empty.summary() == {"best_eval_at_env_steps": None, "best_eval_return_mean": None}


def progress(q: float, returns: list[float]) -> Any:
    return make_progress(
        env_steps=1000,
        learner_steps=10,
        train_seconds=1.0,
        new_env_steps=100,
        new_learner_steps=10,
        episode_return=sum_of(returns),
        episode_length=sum_of(returns),
        q_max=sum_of([q]),
        loss=sum_of([1.0]),
        td_error=sum_of([1.0]),
        exploration=0.1,
    )


def test_values_that_no_return_explains_have_diverged() -> None:
    check = DivergenceCheck(discount=0.99)
    assert check.check(progress(90.0, [500.0])) is None
    assert check.check(progress(1e6, [500.0])) is None, "high, but it may come down"
    assert "diverged by environment step 1,000" in str(check.check(progress(-5e9, [])))
    assert DivergenceCheck(discount=0.99).check(progress(5e9, [])) is None, "rewards may be as large as that"


def test_the_end_of_a_run_is_done_in_full_even_if_a_part_fails(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    def fail() -> None:
        raise OSError("no space left")

    with caplog.at_level(logging.WARNING), Closing() as closing:
        closing.add(lambda: done.append("first"))
        closing.add(fail)
        closing.add(lambda: done.append("last"))
    assert done == ["last", "first"]
    assert "no space left" in caplog.text
