"""The speed of runs whose processes take every step together, worked by hand."""

import pytest

from qfleet.config import AgentConfig
from qfleet.planning.costs import Cost
from qfleet.planning.in_step import iteration_of, with_messages

REPLAY = AgentConfig(env_steps_per_learner_step=4.0)
IN_GRAPH = {"row": Cost(1.0), "learn": Cost(10.0)}
HOST = {
    "act": Cost(1.0), "environment": Cost(5.0), "draw": Cost(16.0), "insert": Cost(2.0), "learn": Cost(3.0),
    "environment beside learning": Cost(19.0),
}  # fmt: skip


def test_a_fused_row_is_followed_by_its_learner_steps() -> None:
    """8 lanes bring two learner steps a row: 16 rows take 16 * (1 + 2 * 10) s."""
    found = iteration_of(REPLAY, 8, IN_GRAPH)
    assert (found.seconds, found.env_steps, found.learner_steps) == (16 * 21.0, 128, 32.0)


def test_the_warm_up_takes_no_learner_steps() -> None:
    assert iteration_of(REPLAY, 8, IN_GRAPH, learns=False).seconds == 16.0


def test_a_rollout_is_followed_by_its_epochs() -> None:
    config = AgentConfig(replay="none", rollout_length=4, num_epochs=2, num_minibatches=3)
    found = iteration_of(config, 8, IN_GRAPH)
    assert (found.seconds, found.learner_steps) == (4 * 1.0 + 6 * 10.0, 6.0)


def test_lock_step_adds_everything_up() -> None:
    """A row acts (1), steps (5), stores (2) and learns twice (6); the iteration draws once (16)."""
    assert iteration_of(REPLAY, 8, HOST, lock_step=True).seconds == pytest.approx(16 * 14.0 + 16.0)


def test_learning_is_hidden_as_far_as_was_measured() -> None:
    """With four learner steps, 14 s of learning and 5 s of stepping took 19 s at once: nothing was hidden."""
    assert iteration_of(REPLAY, 8, HOST).seconds == pytest.approx(16 * 14.0 + 16.0)
    hidden = {**HOST, "environment beside learning": Cost(14.0)}
    assert iteration_of(REPLAY, 8, hidden).seconds == pytest.approx(16 * (1.0 + 8.0) + 16.0)


def test_messages_of_a_ring_take_what_they_must() -> None:
    """Four processes move 2 * 3/4 of 400 bytes past each node at 100 bytes/s, in at least four messages of 1 s."""
    found = with_messages(IN_GRAPH, 4, 400, 1.0, 100.0)["learn"]
    assert found.seconds == pytest.approx(10.0 + 6.0 + 4.0)
    assert with_messages(IN_GRAPH, 1, 400, 1.0, 100.0) == IN_GRAPH
