"""The callbacks and loggers of a run whose processes train on their own, in the process that follows them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qfleet.config import TrainConfig
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.loggers import Logger, Loggers
from qfleet.runtime.metrics import finite, logged_run
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.training.callbacks import CallbackFailed, Callbacks, RunControl, SavedCheckpoint

logger = logging.getLogger("qfleet")


class Observers:
    """Tells callbacks and loggers of what the processes report. Callbacks may stop the run, and nothing else."""

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        callbacks: Sequence[Any],
        loggers: Sequence[tuple[str, Logger]],
        resumed_at: int | None,
    ) -> None:
        """Tells nothing yet.

        Args:
          config: of the run.
          directory: of the run.
          callbacks: the callbacks.
          loggers: the loggers, with their names.
          resumed_at: environment steps from which the run goes on; None if it is new.
        """
        self._callbacks = Callbacks(callbacks, RunControl(config, directory.folder, None))
        self._loggers = Loggers(logged_run(directory), loggers)
        if resumed_at is not None:
            self._loggers.resume_at(resumed_at)
        self._newest = resumed_at

    @property
    def stop_reason(self) -> str | None:
        """Why a callback has asked the run to stop; None if none has."""
        return self._callbacks.control.stop_reason

    def tell(self, progress: Progress, checkpoints: Checkpoints | None = None) -> None:
        """Tells of a record, and of the newest checkpoint if there is another one than before.

        Args:
          progress: the record.
          checkpoints: the run's checkpoints, if it has some as a whole.

        Raises:
          CallbackFailed: if a callback raises.
        """
        self._loggers.write(progress.env_steps, finite(progress.metrics()))
        self._callbacks.on_progress(progress)
        if progress.eval_returns is not None:
            self._callbacks.on_evaluation(progress)
        self._tell_of_checkpoints(checkpoints)

    def _tell_of_checkpoints(self, checkpoints: Checkpoints | None) -> None:
        if checkpoints is None or not self._callbacks.wait_for_checkpoints:
            return
        newest = checkpoints.latest()
        if newest is not None and newest != self._newest:
            self._newest = newest
            self._callbacks.on_checkpoint(SavedCheckpoint(newest, checkpoints.directory / str(newest), False))

    def end(self, summary: Mapping[str, Any], checkpoints: Checkpoints | None = None) -> None:
        """Tells of the last checkpoint, as `tell` does, and of the end. A callback that raises is a warning."""
        try:
            self._tell_of_checkpoints(checkpoints)
        except CallbackFailed as error:
            logger.warning("%s", error)
        self._callbacks.on_failure(summary)
        self._loggers.end(summary)

    def outcome(self, error: str) -> dict[str, Any]:
        """Returns the entries of the summary of a run that callbacks have ended, by an error or by asking; else {}."""
        if error:
            return {"stopped": "failed", "error": error}
        reason = self.stop_reason
        return {} if reason is None else {"stopped": "callback", "stop_reason": reason}
