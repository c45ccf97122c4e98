"""The decisions of the server: which gradients make a learner step, and what version the parameters have after it.

This is a pure state machine. It does not know what a gradient is, how it travels, or whether the shards answer.
"""

from typing import Generic, NamedTuple, TypeVar

from qfleet.config import ParameterServerConfig
from qfleet.core.sharded_learner import TargetUpdateTracker
from qfleet.topologies.parameter_server.gradient_filter import Decision, GradientFilter

G = TypeVar("G")


class Admission(NamedTuple):
    """What became of a gradient that arrived."""

    decision: Decision
    staleness: int
    """Learner steps between the parameters that it was computed with and those that it is applied to."""


class StepBatch(NamedTuple, Generic[G]):
    """Learner steps that the server is to take next, in one request."""

    gradients: list[G]
    """All gradients of the first step, then all of the next."""
    num_steps: int
    version: int
    """Version of the parameters after these steps."""
    updates_target: bool
    """Whether one of them updates the target network."""


class StepQueue(Generic[G]):
    """Groups gradients into learner steps, and counts steps and versions."""

    def __init__(self, config: ParameterServerConfig, target_update_period: int) -> None:
        """Begins with version 0 of the parameters."""
        self._gradients_per_step = config.gradients_per_learner_step
        self._filter = GradientFilter(config)
        self._target_updates = TargetUpdateTracker(target_update_period)
        self.version = 0
        """Counts the steps that the server was sent and the times that it went back. It never decreases, so a version
        stands for one set of parameters only."""
        self.learner_steps = 0
        """Learner steps of the server's state. They decrease when it goes back."""
        self.gradients: list[G] = []
        """Gradients of the next step, which is not complete yet."""
        self.pending_steps: list[list[G]] = []
        """The gradients of each step that is complete and has not been taken from the queue."""

    def push(self, gradient: G, version: int, loss: float) -> Admission:
        """Takes a gradient that has arrived, and decides about it.

        Args:
          gradient: the gradient.
          version: version of the parameters that it was computed with.
          loss: loss of its batch, without importance weights.
        """
        newest_version = self.version + len(self.pending_steps)
        decision = self._filter.decision(version, newest_version, loss)
        if decision == "applied":
            self.gradients.append(gradient)
            if len(self.gradients) == self._gradients_per_step:
                self.pending_steps.append(self.gradients)
                self.gradients = []
        return Admission(decision, newest_version - version)

    def take(self) -> StepBatch[G] | None:
        """Returns all pending steps, which count as taken from now on; None if there are none."""
        steps, self.pending_steps = self.pending_steps, []
        if not steps:
            return None
        self.version += len(steps)
        self.learner_steps += len(steps)
        updates_target = self._target_updates.advance(len(steps))
        return StepBatch([gradient for step in steps for gradient in step], len(steps), self.version, updates_target)

    @property
    def target_age(self) -> int:
        """Learner steps since the target network was updated, after all steps that were taken."""
        return self._target_updates.age

    def is_current(self, version: int) -> bool:
        """Returns whether the server has not gone back since it had this version."""
        return version >= self._filter.oldest_version

    def disown(self) -> int:
        """Drops all gradients, and refuses those that were computed with any version so far.

        Returns:
          How many gradients were dropped.
        """
        num_dropped = len(self.pending_steps) * self._gradients_per_step + len(self.gradients)
        self.pending_steps, self.gradients = [], []
        self.begin_at_version(self.version + 1)
        return num_dropped

    def begin_at_version(self, version: int) -> None:
        """Begins with parameters of this version; gradients of earlier versions are refused."""
        self.version = self._filter.oldest_version = version

    def continue_from(self, learner_steps: int, target_age: int) -> None:
        """Continues with a state of the server that has taken so many learner steps."""
        self.learner_steps, self._target_updates.age = learner_steps, target_age
