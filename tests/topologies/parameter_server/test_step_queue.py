"""The queue: which gradients make a learner step, and what version the parameters have after it."""

from qfleet.config import ParameterServerConfig
from qfleet.topologies.parameter_server.step_queue import StepQueue


def test_steps_that_gathered_are_taken_at_once_and_in_order():
    queue: StepQueue[str] = StepQueue(ParameterServerConfig(gradients_per_learner_step=2, max_staleness=8), 3)
    for gradient in "abcde":
        assert queue.push(gradient, 0, 1.0).decision == "applied"
    batch = queue.take()
    assert batch.gradients == list("abcd") and (batch.num_steps, batch.version, batch.updates_target) == (2, 2, False)
    assert queue.gradients == ["e"] and queue.take() is None
    admission = queue.push("f", 1, 1.0)
    assert admission.staleness == 1
    batch = queue.take()
    assert batch.gradients == ["e", "f"] and (batch.version, batch.updates_target) == (3, True)


def test_a_queue_that_goes_back_counts_versions_on_and_refuses_what_came_before():
    queue: StepQueue[str] = StepQueue(ParameterServerConfig(gradients_per_learner_step=2, max_staleness=100), 3)
    for gradient in "abcd":
        queue.push(gradient, 0, 1.0)
    queue.take()
    for gradient in "efg":
        queue.push(gradient, 2, 1.0)
    assert queue.disown() == 3 and queue.take() is None
    queue.continue_from(learner_steps=1, target_age=1)
    assert (queue.version, queue.learner_steps, queue.target_age) == (3, 1, 1)
    assert queue.push("h", 2, 1.0).decision == "stale" and not queue.is_current(2)
    assert queue.push("i", 3, 1.0).decision == "applied" and queue.is_current(3)
