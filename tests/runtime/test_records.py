"""Records of training: what a chunk's steps add up to."""

import pytest

from qfleet.runtime.records import Sum, make_progress, sum_of, weighted_sum


def test_a_chunk_where_nothing_happened_has_no_means() -> None:
    progress = make_progress(
        env_steps=64, learner_steps=0, train_seconds=0.5, new_env_steps=64, new_learner_steps=0,
        episode_return=Sum(), episode_length=Sum(), q_max=Sum(), loss=Sum(), td_error=Sum(), exploration=1.0,
    )  # fmt: skip
    assert progress.num_episodes == 0
    assert (progress.episode_return_mean, progress.episode_length_mean) == (None, None)
    assert (progress.loss, progress.td_error_mean) == (None, None)
    assert progress.q_mean == progress.staleness == 0


def test_the_mean_over_groups_is_the_mean_over_all_their_values() -> None:
    groups = [[1.0, 2.0], [], [6.0]]
    means, counts = [sum_of(group).mean for group in groups], [len(group) for group in groups]
    assert means[1] is None
    assert weighted_sum(means, counts).mean == pytest.approx(3.0)
