"""Callbacks: objects of the user that are told how a run goes, and that may steer it.

A callback has any of these methods. Each gets the run's `RunControl` and what has happened:

    on_progress(control, progress)        after each chunk of training, before its evaluation: a `Progress`
    on_evaluation(control, progress)      after each evaluation: the same with `eval_returns`
    on_checkpoint(control, checkpoint)    once a checkpoint is whole on disk: a `SavedCheckpoint`
    on_end(control, summary)              at the end, whatever has ended the run: the content of summary.json
"""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qfleet.config import ConfigError, RunFailed, TrainConfig, suggest
from qfleet.config.errors import RAISED_BY_USERS
from qfleet.config.values import show
from qfleet.envs.failures import describe
from qfleet.runtime.loggers import Logger
from qfleet.runtime.records import Progress
from qfleet.runtime.trackers import make_loggers

logger = logging.getLogger("qfleet")

METHODS = ("on_progress", "on_evaluation", "on_checkpoint", "on_end")
"""Names of the methods that a callback may have."""


class SavedCheckpoint(NamedTuple):
    """A checkpoint that is whole on disk."""

    env_steps: int
    path: Path
    """Its folder. A newer checkpoint may displace it later."""
    is_best: bool
    """Whether it is the one of the best evaluation, which holds the learner alone."""


class RunControl:
    """What callbacks may ask of a run. It is done once the callbacks have returned, at the end of the chunk."""

    def __init__(
        self, config: TrainConfig, path: Path, change: Callable[[Mapping[str, float | None]], None] | None
    ) -> None:
        """Asks nothing yet.

        Args:
          config: the run's config.
          path: the run's folder.
          change: changes settings of the run. None if this process doesn't train, so that it can only stop the run.
        """
        self.config = config
        self.path = path
        """The run's folder."""
        self.stop_reason: str | None = None
        """Why a callback has asked the run to stop; None if none has."""
        self._change = change
        self._must_save = self._must_evaluate = False

    def stop(self, reason: str = "a callback has asked for it") -> None:
        """Ends the run after this chunk, with a checkpoint. The summary says "callback", and the reason."""
        self.stop_reason = self.stop_reason or str(reason)

    def save(self) -> None:
        """Saves a checkpoint after this chunk.

        Raises:
          ConfigError: if the topology can't, as for `set`.
        """
        self._changing("save")
        self._must_save = True

    def evaluate(self) -> None:
        """Evaluates after this chunk, or after the next one if this one has been evaluated already.

        Raises:
          ConfigError: if the topology can't, as for `set`.
        """
        self._changing("evaluate")
        self._must_evaluate = True

    def set(self, **settings: float | None) -> None:
        """Gives settings a value for the rest of the run, in place of their schedule; None goes back to the schedule.

        Which settings these are depends on the topology: `exploration` (epsilon, or the temperature),
        `importance_exponent` and `env_steps_per_learner_step`, where this process plans each chunk. Every record of the
        metrics tells the value as `fixed_` and the name, and a run that is resumed keeps it. Other settings, such as
        the learning rate, are part of the compiled program.

        Raises:
          ConfigError: if the topology can't change a setting while it runs, or a value is out of bounds.
        """
        self._changing(" and ".join(settings))(settings)

    def _changing(self, what: str) -> Callable[[Mapping[str, float | None]], None]:
        if self._change is None:
            raise ConfigError(
                f"a callback may only stop a run of topology {self.config.topology.name}, whose processes train on "
                f"their own, got {what}; train with topology fused or overlapped"
            )
        return self._change

    def take_save_request(self) -> bool:
        """Returns whether a callback has asked for a checkpoint since the last call."""
        is_asked, self._must_save = self._must_save, False
        return is_asked

    def take_evaluation_request(self) -> bool:
        """Returns whether a callback has asked for an evaluation since the last call."""
        is_asked, self._must_evaluate = self._must_evaluate, False
        return is_asked


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises ConfigError unless each of these is an object with methods of a callback, and with no similar ones."""
    if not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"callbacks must be a list of objects, got {show(callbacks)}; write [...] around it")
    for callback in callbacks:
        named = [name for name in dir(callback) if name.startswith("on_")]
        if unknown := [name for name in named if name not in METHODS]:
            raise ConfigError(
                f"a callback's methods must be among {', '.join(METHODS)}, got {unknown[0]} of "
                f"{type(callback).__name__}.{suggest(unknown[0], METHODS)} Or begin its name with another word"
            )
        if not any(callable(getattr(callback, name)) for name in named) or isinstance(callback, type):
            raise ConfigError(
                f"a callback must be an object with any of the methods {', '.join(METHODS)}, got {show(callback)}"
            )


def check_observers(callbacks: Sequence[Any], loggers: Sequence[str | Logger]) -> dict[str, Any]:
    """Returns the callbacks and loggers of a run as arguments for it, after checking them.

    Raises:
      ConfigError: as `check_callbacks` and `make_loggers` do.
    """
    check_callbacks(callbacks)
    return {"callbacks": tuple(callbacks), "loggers": make_loggers(loggers)}


class Callbacks:
    """The callbacks of one run, which are called in turn."""

    def __init__(self, callbacks: Sequence[Any], control: RunControl) -> None:
        self.control = control
        self._of = {name: [getattr(each, name) for each in callbacks if hasattr(each, name)] for name in METHODS}

    def on_checkpoints(self, take_complete: Callable[[], Sequence[SavedCheckpoint]]) -> None:
        """Tells of checkpoints, which are looked for only if somebody wants to know."""
        if self.wait_for_checkpoints:
            for checkpoint in take_complete():
                self.on_checkpoint(checkpoint)

    @property
    def wait_for_checkpoints(self) -> bool:
        """Whether any callback wants to know when a checkpoint is whole."""
        return bool(self._of["on_checkpoint"])

    def on_progress(self, progress: Progress) -> None:
        """Tells of a chunk of training."""
        self._call("on_progress", progress)

    def on_evaluation(self, progress: Progress) -> None:
        """Tells of an evaluation."""
        self._call("on_evaluation", progress)

    def on_checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        """Tells of a checkpoint."""
        self._call("on_checkpoint", checkpoint)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Tells of the end."""
        self._call("on_end", summary)

    def on_failure(self, summary: Mapping[str, Any]) -> None:
        """Tells of the end of a run that has failed. If that fails too, it is a warning."""
        try:
            self.on_end(summary)
        except RunFailed as error:  # the failure of the run matters more
            logger.warning("%s", error)

    def _call(self, name: str, happened: Any) -> None:
        for method in self._of[name]:
            try:
                method(self.control, happened)
            except RAISED_BY_USERS as error:
                raise CallbackFailed(_message(method, name, error)) from error


class CallbackFailed(RunFailed):
    """A callback has raised, which ends the run as an exception in the loop over it does."""

    def __init__(self, message: str) -> None:
        super().__init__(message, learner_is_sound=True)


def _message(method: Any, name: str, error: BaseException) -> str:
    owner = type(getattr(method, "__self__", method)).__name__
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without this module's own
    where = f" at {frames[0].filename}:{frames[0].lineno}" if frames else ""
    return f"the callback {owner}.{name} failed{where}: {describe(error)}"
