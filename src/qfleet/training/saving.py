"""When and how a run's checkpoints are saved: on the way, where a failure may pass, and at the end."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.config import ConfigError
from qfleet.core.learner import LearnerState
from qfleet.envs.failures import describe
from qfleet.runtime.activity import announce
from qfleet.runtime.best_checkpoint import RETURN_MEAN, BestCheckpoint
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.signals import StopRequested
from qfleet.topologies.base import LEARNER_ALONE, StateIsLost, Topology
from qfleet.topologies.mesh import leaves_of
from qfleet.training.callbacks import SavedCheckpoint
from qfleet.training.outcome import Evaluations, evaluation_of

logger = logging.getLogger("qfleet")


class KeptLearner(NamedTuple):
    """The learner of the best evaluation, until it is on disk."""

    env_steps: int
    learner: LearnerState
    metadata: dict[str, Any]


class Saving:
    """Saves the checkpoints of one run.

    The learner of the best evaluation is copied at once, and written with the next checkpoint. A run that still
    improves has a better one at almost every evaluation, and writing each would cost more than the evaluation itself.
    """

    def __init__(
        self,
        topology: Topology,
        checkpoints: Checkpoints,
        best: BestCheckpoint,
        warn: Callable[[str, str], None],
        *,
        keeps_best: bool,
    ) -> None:
        """Saves nothing yet.

        Args:
          topology: whose state is saved.
          checkpoints: the run's checkpoints.
          best: the checkpoint of its best evaluation.
          warn: logs and notes a warning, given what it is about and its text.
          keeps_best: whether the learner of the best evaluation is kept.
        """
        self._keeps_best = keeps_best
        self._topology, self._checkpoints, self._best = topology, checkpoints, best
        self._warn = warn
        self._kept: KeptLearner | None = None
        self._incomplete: dict[bool, int] = {}  # environment steps of the checkpoints under way, by whether one is best

    def save(self, notes: dict[str, Any]) -> None:
        """Begins to save a checkpoint, and the best one if it has changed.

        If the state is lost for the moment, that is a warning.

        Args:
          notes: its metadata, apart from what the topology says about itself.
        """
        announce("saving")
        self._save_best()
        topology = self._topology
        try:
            state = topology.state  # must come first: a fleet continues meanwhile, and this fixes what counts
        except StateIsLost as error:
            logger.warning("there is no checkpoint at environment step %d: %s", topology.env_steps, error)
            return
        if jax.process_count() > 1:
            self._best.wait()  # because several processes must write in the same order
        self._checkpoints.save(topology.env_steps, state, {"layout": topology.layout, **self._metadata(notes)})
        self._incomplete[False] = topology.env_steps

    def keep_if_best(
        self, evaluations: Evaluations, play_fresh: Callable[[], np.ndarray | None], notes: dict[str, Any]
    ) -> None:
        """Keeps the learner if its evaluation is the best one and fresh episodes confirm that.

        Args:
          evaluations: the run's evaluations, of which the newest has just been played.
          play_fresh: plays fresh episodes, and returns their returns, `[seeds, episodes]`, or None. It may raise
            StopRequested.
          notes: as for `save`.
        """
        if evaluations.newest is None or not evaluations.is_better(evaluations.newest):
            return
        if not self._keeps_best:
            evaluations.best = evaluations.newest
            return
        try:
            fresh = play_fresh()
        except StopRequested:
            return
        if fresh is None or not evaluations.is_better(confirmed := evaluation_of(self._topology.env_steps, fresh)):
            return
        try:
            learner, env_steps = self._topology.learner, self._topology.env_steps
        except StateIsLost as error:
            logger.warning("the learner of the best evaluation isn't kept: %s", error)
            return
        evaluated = {RETURN_MEAN: confirmed.mean, "return_error": confirmed.error}
        metadata = {**self._metadata(notes), "layout": LEARNER_ALONE, **evaluated}
        is_alone = jax.process_count() == 1
        if is_alone:  # otherwise no process has all of it
            learner = jax.tree.unflatten(jax.tree.structure(learner), leaves_of(learner))
        self._kept = KeptLearner(env_steps, learner, metadata)
        evaluations.best = confirmed._replace(env_steps=env_steps)
        if not is_alone:
            self._checkpoints.wait()  # because several processes must write in the same order
            self._save_best()

    def _save_best(self) -> None:
        """Begins to save the kept learner in place of the best checkpoint, unless it is there already.

        If that fails, it is a warning, and the next call tries again.
        """
        if self._kept is None:
            return
        try:
            if self._best.save_learner(*self._kept):
                self._incomplete[True] = self._kept.env_steps
            if self._kept.env_steps in self._best.all() or jax.process_count() > 1:
                self._kept = None
        except (OSError, ConfigError) as error:
            if jax.process_count() > 1:
                raise
            self._warn("saving the best", f"{error}. The run goes on, and the next checkpoint tries again")

    def save_if_possible(self, notes: dict[str, Any]) -> None:
        """Saves on the way. A disk that is full now may have room at the next time."""
        try:
            self.save(notes)
        except (OSError, ConfigError) as error:  # a folder that can't be read, or another run's checkpoint
            if jax.process_count() > 1:  # several processes can only save together
                raise
            self._warn("saving", f"{error}. The run goes on, and the next checkpoint tries again")

    def save_at_end(self, notes: dict[str, Any]) -> None:
        """Saves the last checkpoint, and returns when it is complete.

        Raises:
          OSError: if it can't be written.
        """
        with contextlib.suppress(OSError):  # of an earlier checkpoint, which must not prevent this one
            self._checkpoints.wait()
        self.save(notes)
        self._checkpoints.wait()
        self._wait_for_best()

    def _wait_for_best(self) -> None:
        """Waits until the best checkpoint is complete. That it can't be written is a warning."""
        try:
            self._best.wait()
        except OSError as error:
            self._warn("saving the best", f"{error}. There is no checkpoint of the best evaluation")

    def save_after_failure(self, notes: dict[str, Any], *, is_sound: bool) -> None:
        """Saves what is sound after the run has failed, unless several processes would have to do so together.

        Args:
          notes: as for `save`.
          is_sound: whether the newest state is. The best learner always is.
        """
        if jax.process_count() > 1:
            return
        try:
            if is_sound:
                self.save(notes)
                self._checkpoints.wait()
            else:
                self._save_best()
        except Exception as error:
            logger.warning("what the run has learned since its newest checkpoint is lost: %s", describe(error))
        self._wait_for_best()

    def newest(self) -> int | None:
        """Returns the environment steps of the newest checkpoint, None if there is none or the folder can't be read."""
        try:
            return self._checkpoints.latest()
        except ConfigError as error:  # the error under way matters more
            logger.warning("%s", error)
            return None

    def take_complete(self) -> list[SavedCheckpoint]:
        """Returns the checkpoints that have become whole on disk since the last call. It waits for none."""
        complete = []
        for is_best, env_steps in list(self._incomplete.items()):
            source = self._best if is_best else self._checkpoints
            with contextlib.suppress(ConfigError):  # a folder that can't be read, which the next save will say
                if env_steps in source.all():
                    complete.append(SavedCheckpoint(env_steps, source.directory / str(env_steps), is_best))
                    del self._incomplete[is_best]
        return complete

    def summary(self) -> dict[str, Any]:
        """Returns the entries of a run's summary: environment steps of the newest and of the best checkpoint."""
        best = None
        with contextlib.suppress(ConfigError):
            best = self._best.latest()
        return {"newest_checkpoint": self.newest(), "best_checkpoint": best}

    def _metadata(self, notes: dict[str, Any]) -> dict[str, Any]:
        return {"counters": self._topology.counters, **notes}
