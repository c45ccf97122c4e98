"""The interface between a run and its topology."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
from jax.typing import ArrayLike

from qfleet.config import AgentConfig, RunFailed
from qfleet.core.learner import LearnerState
from qfleet.core.types import Params
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.evaluation import Episodes, never
from qfleet.runtime.records import Progress
from qfleet.topologies.footprint import Footprint


class StateIsLost(Exception):
    """A process that holds part of the state is lost and can't be replaced yet. The run may go on without it."""


class Layout(TypedDict):
    """Division of a checkpoint's arrays. Checkpoints with equal layouts hold the same arrays, shape by shape."""

    topology: str
    """Name of the topology that saved the checkpoint."""
    num_segments: int
    """Groups of lanes that step together: one, or one for each actor, worker or peer."""
    lanes_per_segment: int


LEARNER_ALONE = Layout(topology="none", num_segments=0, lanes_per_segment=0)
"""Layout of a checkpoint that holds a learner and nothing else, which is no topology's own."""


class Topology(abc.ABC):
    """One learner or several, wherever they run. `advance` trains them, one chunk at a time."""

    env_steps: int
    """Environment steps taken so far, over all lanes of one seed."""
    learner_steps: int
    """Learner steps taken so far, by each seed's learner."""
    checkpoints_path: Path | None = None
    """Folder of the run's checkpoints. Processes that replace others restore their state from it."""
    changeable: tuple[str, ...] = ()
    """Settings that `fixed` may give a value while it runs, without compiling anew."""
    fixed: Mapping[str, float] = MappingProxyType({})
    """Values that replace the schedules of settings from the next chunk on, by name; all among `changeable`."""
    _replay_starts_at: int
    """Environment steps when the replay was last empty."""

    @abc.abstractmethod
    def footprint(self) -> Footprint:
        """Returns what it keeps on which devices, from shapes alone. May be called before `start`."""

    @abc.abstractmethod
    def start(self) -> float:
        """Compiles its programs, starts its processes, and returns the wall time that took, in seconds."""

    @abc.abstractmethod
    def advance(self, until_env_steps: int) -> Progress:
        """Trains one chunk further, up to the first iteration that reaches `until_env_steps`.

        Raises:
          RunFailed: if the run can't continue.
        """

    def prepare_evaluation(self) -> None:  # noqa: B027, does nothing where evaluations need no lanes of their own
        """Makes what evaluations need, so that what can't be made is known before anything is learned.

        Raises:
          RunFailed: if the environment fails.
        """

    @abc.abstractmethod
    def evaluate(
        self,
        num_episodes: int,
        batch: int = 0,
        *,
        max_episode_steps: int | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns episodes of the newest parameters, `[num_seeds, num_episodes]`; None if it was stopped.

        The policy is greedy, but for random actions with probability `TrainConfig.eval_exploration`. There are fewer
        episodes if environments fail in too many of them.

        Args:
          num_episodes: number of episodes of each seed.
          batch: evaluations of the same parameters with different numbers see different episodes.
          max_episode_steps: steps after which an episode is cut, where the environment's time limit isn't lower.
          should_stop: called now and then. Once it returns True, the evaluation ends soon.
        """

    @property
    @abc.abstractmethod
    def params(self) -> Params:
        """The newest parameters."""

    @property
    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        Raises:
          StateIsLost: if no checkpoint can be made now.
        """

    @property
    @abc.abstractmethod
    def learner(self) -> LearnerState:
        """The newest learner state, of which `params` is a part. Its arrays may be deleted by the next `advance`.

        Raises:
          StateIsLost: if it can't be had now.
        """

    @property
    def counters(self) -> dict[str, int]:
        """The counts that `restore` needs in addition to `state`."""
        return {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "replay_starts_at": self._replay_starts_at,
        }

    @abc.abstractmethod
    def restore(self, state: dict[str, Any], counters: dict[str, int]) -> None:
        """Goes on from a checkpoint; if it has no replay, from an empty one, after a new warm-up."""

    @property
    @abc.abstractmethod
    def layout(self) -> Layout:
        """The layout of the checkpoints that it saves, and that it can read without dividing arrays anew."""

    @abc.abstractmethod
    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds, divided anew if its layout is another.

        Args:
          checkpoints: the run's checkpoints.
          checkpoint: the environment steps of the one to read; None reads the newest.
          metadata: the metadata of that checkpoint.

        Raises:
          ConfigError: if the checkpoint is damaged, or was saved by another agent.
        """

    def replay_measures(self) -> dict[str, float]:
        """Returns what `ReplayMeasures.read` does; what this topology doesn't measure is absent."""
        return {}

    @property
    def facts(self) -> dict[str, Any]:
        """Entries of the run's summary that only this topology has."""
        return {}

    def keep(self, index: int) -> None:  # noqa: B027, does nothing where there is one seed, since the run ends then
        """Keeps the learner of one of many seeds as it is now, while the others train on."""

    def close(self) -> None:  # noqa: B027, does nothing where everything is one program
        """Ends the threads and processes that it started. May be called twice, and before `start`."""


class OwnLearner(Topology):
    """A topology whose learner is in this process, and can be replaced by one that was trained elsewhere."""

    @property
    @abc.abstractmethod
    def env_steps_per_iteration(self) -> int:
        """Environment steps of one iteration, over all lanes of one seed: `advance` stops at multiples of it."""

    @abc.abstractmethod
    def set_learner(self, learner: LearnerState) -> None:
        """Goes on from another learner state, whose arrays must lie where its own do and be used by nobody else."""


def check_loss(loss: ArrayLike, learner_steps: int, config: AgentConfig) -> None:
    """Checks the mean loss, or the sum of losses, of each seed, in a chunk that ended at `learner_steps`.

    Raises:
      RunFailed: if one isn't finite.
    """
    if not np.all(np.isfinite(loss)):
        raise RunFailed(
            f"the loss must be finite, but it wasn't by learner step {learner_steps}: the values diverged; "
            f"try a lower learning_rate than {config.learning_rate}, or a smaller max_gradient_norm"
        )
