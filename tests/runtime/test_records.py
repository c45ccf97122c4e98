"""Records of training: what a chunk's steps add up to."""

import dataclasses

import pytest

from qfleet.runtime.records import Sum, make_progress, sum_of, weighted_sum

EMPTY = make_progress(
    env_steps=64, learner_steps=0, train_seconds=0.5, new_env_steps=64, new_learner_steps=0,
    episode_return=Sum(), episode_length=Sum(), q_max=Sum(), loss=Sum(), td_error=Sum(), exploration=1.0,
)  # fmt: skip


def test_a_chunk_where_nothing_happened_has_no_means() -> None:
    progress = EMPTY
    assert progress.num_episodes == 0
    assert (progress.episode_return_mean, progress.episode_length_mean) == (None, None)
    assert (progress.loss, progress.td_error_mean) == (None, None)
    assert progress.q_mean == progress.staleness == 0


def test_the_mean_over_groups_is_the_mean_over_all_their_values() -> None:
    groups = [[1.0, 2.0], [], [6.0]]
    means, counts = [sum_of(group).mean for group in groups], [len(group) for group in groups]
    assert means[1] is None
    assert weighted_sum(means, counts).mean == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        (None, {"eval_return_mean": None}),
        (((1.0, 3.0),), {"eval_return_mean": 2.0}),
        (
            ((1.0, 3.0), (5.0, 7.0)),
            {"eval_return_mean": 4.0, "eval_return_mean_seed_0": 2.0, "eval_return_mean_seed_1": 6.0},
        ),
    ],
)
def test_a_log_has_the_return_of_each_of_several_seeds(
    returns: tuple[tuple[float, ...], ...] | None, expected: dict[str, float | None]
) -> None:
    logged = dataclasses.replace(EMPTY, eval_returns=returns).metrics()
    assert {name: value for name, value in logged.items() if name.startswith("eval_return_mean")} == expected
