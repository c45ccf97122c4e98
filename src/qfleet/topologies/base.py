"""What a run asks of any topology."""

import abc
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from qfleet.config import AgentConfig, RunFailed
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.core.replay.layout import resharded
from qfleet.core.replay.ring import Ring, Row
from qfleet.core.types import Params
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.records import Progress
from qfleet.topologies.footprint import Footprint

logger = logging.getLogger("qfleet")


class StateIsLost(Exception):
    """A process that has part of the state is lost, and has nowhere to come back to; the run may go on without."""


class Topology(abc.ABC):
    """One learner or several, wherever they run; `advance` trains them a chunk further."""

    env_steps: int
    """Taken so far, over all lanes of one seed."""
    learner_steps: int
    """Taken so far, by each seed's learner."""
    checkpoints_path: Path | None = None
    """Where checkpoints are kept, for parts of it that are replaced on the way."""
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
        """The parts of a checkpoint by name; without the replay if the config leaves it out.

        Raises:
          StateIsLost: if there can't be a checkpoint now.
        """

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

    @property
    @abc.abstractmethod
    def layout(self) -> str:
        """What a checkpoint must have been saved by to hold the very arrays of this one."""

    @abc.abstractmethod
    def read(self, checkpoints: Checkpoints, checkpoint: int | None, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns the state that a checkpoint holds, divided anew where another topology or size has saved it.

        Args:
          checkpoints: of the run.
          checkpoint: which of them; None is the newest.
          metadata: of it.

        Raises:
          ConfigError: if it is damaged, or of another agent.
        """

    @property
    def facts(self) -> dict[str, Any]:
        """What the run's summary should hold beside what all topologies have."""
        return {}

    def keep(self, index: int) -> None:  # noqa: B027, with one seed there is nothing to do: the run ends
        """Keeps the learner of one of many seeds as it is now, while the others train on."""

    def close(self) -> None:  # noqa: B027, what is all in one program has nothing to end
        """Ends the threads and processes that it started; may be called twice, and before `start`."""


class OwnLearner(Topology):
    """A topology whose learner is in this process, and can be given what others have learned."""

    @property
    @abc.abstractmethod
    def env_steps_per_iteration(self) -> int:
        """Over all lanes of one seed: `advance` stops at multiples of it."""

    @property
    @abc.abstractmethod
    def learner(self) -> LearnerState:
        """The newest; its arrays may be gone after the next `advance`."""

    @abc.abstractmethod
    def set_learner(self, learner: LearnerState) -> None:
        """Has it go on with another, whose arrays lie where its own do, and are for nobody else."""


def read_as(
    topology: Topology,
    checkpoints: Checkpoints,
    checkpoint: int | None,
    metadata: dict[str, Any],
    config: AgentConfig,
    frame_stack: int,
) -> dict[str, Any]:
    """Returns what `Topology.read` does, for one that keeps all of it as JAX arrays, in one segment."""
    like = topology.state
    if metadata["layout"] == topology.layout:
        return checkpoints.restore(checkpoint, like)[0]
    state: dict[str, Any] = {"learner": checkpoints.restore_item("learner", like["learner"], checkpoint)}
    if like.get("replay"):
        wanted: SavedReplay = like["replay"]
        num_rows, num_lanes = wanted.ring.rows.outcome.shape
        saved = resharded_replay(
            saved_replay(checkpoints.restore_item("replay", env_steps=checkpoint)),
            (num_rows, num_lanes, 1),
            config,
            frame_stack,
            is_prioritised=not isinstance(wanted.leaves, tuple),
        )
        state["replay"] = jax.tree.map(_placed_like, saved, wanted)
    return state


def _placed_like(array: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])


def saved_replay(item: dict[str, Any]) -> SavedReplay:
    """Returns the replay of a checkpoint, which is nested dictionaries of arrays."""
    ring = item["ring"]
    return SavedReplay(Ring(**{**ring, "rows": Row(**ring["rows"])}), item.get("leaves", ()), item["max_priority"])


def resharded_replay(
    saved: SavedReplay, shape: tuple[int, int, int], config: AgentConfig, frame_stack: int, *, is_prioritised: bool
) -> SavedReplay:
    """Returns a saved replay divided anew: `shape` is rows, lanes and segments. Says so if that drops something."""
    num_rows, num_lanes, num_segments = shape
    saved, num_dropped = resharded(
        saved,
        num_rows,
        num_lanes,
        num_segments,
        n_step=config.n_step,
        frame_stack=frame_stack,
        is_prioritised=is_prioritised,
    )
    if num_dropped:
        logger.warning("dividing the replay anew over %d lanes dropped %d of its steps", num_lanes, num_dropped)
    return saved


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
