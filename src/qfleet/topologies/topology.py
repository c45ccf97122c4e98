"""What a run asks of any topology."""

import abc
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from qfleet.config import AgentConfig, RunFailed
from qfleet.core.types import Params
from qfleet.runtime.records import Progress
from qfleet.topologies.footprint import Footprint


class Topology(abc.ABC):
    """One learner or several, wherever they run; `advance` trains them a chunk further."""

    env_steps: int
    """Taken so far, over all lanes of one seed."""
    learner_steps: int
    """Taken so far, by each seed's learner."""
    _replay_starts_at: int
    """Environment steps when the replay was last empty."""

    @abc.abstractmethod
    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, from shapes alone; to call before `start`, or at any time."""

    @abc.abstractmethod
    def start(self) -> float:
        """Compiles and starts all that it needs, and returns the wall time that took, in seconds."""

    @abc.abstractmethod
    def advance(self, until_env_steps: int) -> Progress:
        """Trains one chunk further, up to the first iteration that reaches `until_env_steps`.

        Raises:
          RunFailed: if the run can't go on.
        """

    @abc.abstractmethod
    def evaluate(self, num_episodes: int, batch: int = 0) -> np.ndarray:
        """Returns greedy returns of the newest parameters, `[num_seeds, num_episodes]`.

        Args:
          num_episodes: of each seed.
          batch: evaluations of the same parameters with different numbers see different episodes.
        """

    @property
    @abc.abstractmethod
    def params(self) -> Params:
        """The newest parameters."""

    @property
    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out."""

    @property
    def counters(self) -> dict[str, int]:
        """What `restore` needs beside `state`."""
        return {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "replay_starts_at": self._replay_starts_at,
        }

    @abc.abstractmethod
    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint; where it has no replay, from an empty one, after a new warm-up."""

    def keep(self, index: int) -> None:  # noqa: B027, with one seed there is nothing to do: the run ends
        """Keeps the learner of one of many seeds as it is now, while the others train on."""

    def close(self) -> None:  # noqa: B027, what is all in one program has nothing to end
        """Ends the threads and processes that it started; may be called twice, and before `start`."""


def check_loss(loss: ArrayLike, learner_steps: int, config: AgentConfig) -> None:
    """Checks the mean loss or sum of losses until `learner_steps`, of each seed.

    Raises:
      RunFailed: if one isn't finite.
    """
    if not np.all(np.isfinite(loss)):
        raise RunFailed(
            f"the loss must be finite, but it wasn't by learner step {learner_steps}: the values diverged; "
            f"try a lower learning_rate than {config.learning_rate}, or a smaller max_gradient_norm"
        )
