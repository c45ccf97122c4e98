"""When and how a run's checkpoints are saved: on the way, where a failure may pass, and at the end."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qfleet.config import ConfigError
from qfleet.envs.failures import describe
from qfleet.runtime.activity import announce
from qfleet.runtime.best_checkpoint import RETURN_MEAN, BestCheckpoint
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.signals import StopRequested
from qfleet.topologies.base import LEARNER_ALONE, StateIsLost, Topology
from qfleet.training.callbacks import SavedCheckpoint
from qfleet.training.outcome import Evaluation, Evaluations, evaluation_of

logger = logging.getLogger("qfleet")


class Saving:
    """Saves the checkpoints of one run."""

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
        self._incomplete: dict[bool, int] = {}  # environment steps of the checkpoints under way, by whether one is best

    def save(self, notes: dict[str, Any]) -> None:
        """Begins to save a checkpoint. If the state is lost for the moment, that is a warning.

        Args:
          notes: its metadata, apart from what the topology says about itself.
        """
        announce("saving")
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
        env_steps = self._save_best(confirmed, notes)
        if env_steps is not None:
            evaluations.best = confirmed._replace(env_steps=env_steps)

    def _save_best(self, evaluation: Evaluation, notes: dict[str, Any]) -> int | None:
        """Begins to save the learner as that of the best evaluation, in place of the one before.

        Args:
          evaluation: the evaluation that says so.
          notes: as for `save`.

        Returns:
          Its environment steps, which are the topology's; None if it isn't saved, which is a warning.
        """
        self._wait_for_best()
        try:
            learner = self._topology.learner
            if jax.process_count() > 1:
                self._checkpoints.wait()
            evaluated = {RETURN_MEAN: evaluation.mean, "return_error": evaluation.error}
            metadata = {**self._metadata(notes), "layout": LEARNER_ALONE, **evaluated}
            if self._best.save_learner(self._topology.env_steps, learner, metadata):
                self._incomplete[True] = self._topology.env_steps
                return self._topology.env_steps
        except StateIsLost as error:
            logger.warning("the learner of the best evaluation isn't kept: %s", error)
        except (OSError, ConfigError) as error:
            if jax.process_count() > 1:
                raise
            self._warn("saving the best", f"{error}. The run goes on, and keeps the next one that is better")
        return None

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
            self._warn("saving the best", f"{error}. The run goes on, and keeps the next one that is better")

    def save_after_failure(self, notes: dict[str, Any]) -> None:
        """Saves what is sound after the run has failed, unless several processes would have to do so together."""
        if jax.process_count() > 1:
            return
        try:
            self.save(notes)
            self._checkpoints.wait()
        except Exception as error:
            logger.warning("what the run has learned since its newest checkpoint is lost: %s", describe(error))

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
