"""Loggers: where the numbers of a run go beside metrics.jsonl, such as TensorBoard, a tracker, or the user's own.

Each logger has a thread of its own. So it can neither delay the run nor end it: if it fails, that is one warning, and
nothing more is logged there.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qfleet.config.errors import RAISED_BY_USERS
from qfleet.envs.failures import describe

logger = logging.getLogger("qfleet")

END_SECONDS = 30.0
"""The longest wait at the end of a run for all that loggers still have to write or send."""

_MOST_WAITING = 1000  # records

_OFF_SECONDS = 1.0  # in which the thread of a logger that has failed ends, unless it hangs


def has_abandoned() -> bool:
    """Returns whether a logger still hangs in this process. What it uses may make the end of Python wait for it."""
    return _has_abandoned


class LoggedRun(NamedTuple):
    """What a logger is told about a run when it begins."""

    path: Path
    """The run's folder, whose name is the run's."""
    run_id: str
    """Random name of the run, the same when it is resumed; empty for runs of older versions."""
    config: Mapping[str, Any]
    """The run's config as JSON holds it, nested."""
    resumed_at: int | None
    """Environment steps from which the run goes on; None if it is new. Later records are logged again."""


class Logger(Protocol):
    """What any object needs for `qfleet.train(config, loggers=[...])`. The methods are called in one other thread."""

    def begin(self, run: LoggedRun) -> None:
        """Begins, just before the first record."""

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of one record, all of them finite, at this environment step."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Ends, with the content of summary.json; with {} after a failure."""


class _Record(NamedTuple):
    env_steps: int
    numbers: Mapping[str, float]


class BackgroundLogger:
    """A logger in its thread."""

    def __init__(self, target: Logger, name: str) -> None:
        """Starts nothing; the first record does.

        Args:
          target: the logger.
          name: its name in warnings.
        """
        self._target, self._name = target, name
        self._waiting: queue.Queue[_Record | Mapping[str, Any]] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._is_off = False

    def write(self, run: LoggedRun, record: _Record) -> None:
        """Adds one record, and returns at once."""
        if self._is_off:
            return
        if self._thread is None:
            name = f"qfleet-{self._name.lower()}"
            self._thread = threading.Thread(target=self._log, args=(run,), name=name, daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._turn_off(f"{_MOST_WAITING} records wait to be written")

    def end(self, summary: Mapping[str, Any]) -> None:
        """Tells the logger to end, and returns at once."""
        if self._thread is not None and not self._is_off:
            try:
                self._waiting.put_nowait(summary)
            except queue.Full:
                self._turn_off(f"{_MOST_WAITING} records wait to be written")

    def wait(self, seconds: float) -> None:
        """Waits until the logger has ended, but no longer than this."""
        if self._thread is not None:
            self._thread.join(max(0.0, min(seconds, _OFF_SECONDS) if self._is_off else seconds))
            if self._thread.is_alive():
                global _has_abandoned
                _has_abandoned = True
                self._turn_off(f"writing the last of it took more than {END_SECONDS:g} s")
        self._thread = None

    def _turn_off(self, reason: str) -> None:
        if not self._is_off:
            logger.warning("%s can't log the run any more; the run goes on: %s", self._name, reason)
        self._is_off = True

    def _log(self, run: LoggedRun) -> None:
        try:
            self._target.begin(run)
            try:
                summary = self._log_until_end()
            except RAISED_BY_USERS:
                with contextlib.suppress(*RAISED_BY_USERS):  # the failure under way matters more
                    self._target.end({})  # which closes files
                raise
            self._target.end(summary)
        except RAISED_BY_USERS as error:  # whatever it is, it must not cost the run
            self._turn_off(describe(error))

    def _log_until_end(self) -> Mapping[str, Any]:
        """Logs records until there is a summary in their place, and returns that; {} if the run has given up."""
        while not self._is_off:
            waiting = self._waiting.get()
            if not isinstance(waiting, _Record):
                return waiting
            self._target.log(waiting.env_steps, waiting.numbers)
        return {}


class Loggers:
    """All loggers of a run."""

    def __init__(self, run: LoggedRun, loggers: Sequence[tuple[str, Logger]]) -> None:
        """Starts nothing.

        Args:
          run: the run that they log.
          loggers: loggers with their names.
        """
        self._run = run
        self._loggers = [BackgroundLogger(target, name) for name, target in loggers]

    def resume_at(self, env_steps: int) -> None:
        """Notes that the run goes on from there. Call it before `write`."""
        self._run = self._run._replace(resumed_at=env_steps)

    def write(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        """Adds one record, and returns at once."""
        for each in self._loggers:
            each.write(self._run, _Record(env_steps, numbers))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Ends all loggers, and waits for all of them together no longer than `END_SECONDS`. Idempotent."""
        for each in self._loggers:
            each.end(summary)
        deadline = time.monotonic() + END_SECONDS
        for each in self._loggers:
            each.wait(deadline - time.monotonic())
        self._loggers = []


_has_abandoned = False
