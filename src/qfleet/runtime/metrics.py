"""The metrics of a run: one line of JSON per progress record, and the same numbers for TensorBoard and trackers."""

import itertools
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from qfleet.config import ConfigError
from qfleet.config.encoding import encode
from qfleet.runtime.loggers import LoggedRun, Logger, Loggers
from qfleet.runtime.run_directory import RunDirectory, strict_json
from qfleet.runtime.run_files import UnusableFile, open_to_append, parse_json, read_lines, shortened, temporary_of
from qfleet.runtime.tensorboard import TensorBoardLogger

logger = logging.getLogger("qfleet")

_BEGINNING = b'{"env_steps": '
"""How every line begins."""


def logged_run(run: RunDirectory) -> LoggedRun:
    """Returns what loggers are told about a run that begins."""
    return LoggedRun(run.folder, run.run_id, encode(run.config), None)


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Returns those values that are finite numbers."""
    numbers = {name: float(value) for name, value in values.items() if value is not None}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class MetricsWriter:
    """Appends progress records to metrics.jsonl, and gives them to loggers. Use it as a context manager.

    A line holds `env_steps`, `wall_seconds` and the record's values. A value that isn't finite is null. `wall_seconds`
    is the time since the run began, plus that of the runs that this one resumes. Records that can't be written, because
    the disk is full for example, are left out and the run goes on; the first such failure is logged.
    """

    def __init__(
        self, run: RunDirectory, began: float | None = None, loggers: Sequence[tuple[str, Logger]] = ()
    ) -> None:
        """Writes nothing yet.

        Args:
          run: the run's folder.
          began: when the run began, on the monotonic clock; by default now.
          loggers: further loggers of the same numbers, with their names.
        """
        self._path = run.metrics_path
        self._began = time.monotonic() if began is None else began
        self._earlier_seconds = 0.0
        self._file: TextIO | None = None
        self._has_failed = False
        self._loggers = Loggers(logged_run(run), [("TensorBoard", TensorBoardLogger()), *loggers])
        self.summary: Mapping[str, Any] = {}
        """What the loggers are told at the end."""

    def truncate_after(self, env_steps: int) -> None:
        """Drops the records after `env_steps`, because a run that resumes from there will write them again.

        Also drops the last line if it was cut off in the middle. Call this before the first `write`.

        Raises:
          ConfigError: if any other line isn't a record, or the file can't be rewritten.
        """
        path = self._path
        try:
            lines = read_lines(path)
            first = next(lines, b"")
        except FileNotFoundError:
            first, lines = b"", iter(())
        except (OSError, UnusableFile) as error:
            raise ConfigError(f"metrics.jsonl must be a readable file, got {path} ({error}); move it away") from error
        if first:
            temporary = temporary_of(path)
            try:
                with temporary.open("xb") as file:
                    file.writelines(self._records_until(env_steps, itertools.chain([first], lines)))
                os.replace(temporary, path)
            except OSError as error:
                raise ConfigError(
                    f"metrics.jsonl must be rewritten without its records after environment step {env_steps}, got "
                    f"{error.strerror} in {path.parent}; free space or fix permissions there"
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
        self._loggers.resume_at(env_steps)

    def _records_until(self, env_steps: int, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the lines of the records up to `env_steps`, and notes the time that they tell of."""
        number, line = 0, b""
        try:
            for line in lines:
                number += 1
                record = parse_json(line)
                is_late = record["env_steps"] > env_steps
                seconds = float(record["wall_seconds"])
                if not is_late:
                    yield line if line.endswith(b"\n") else line + b"\n"
                    self._earlier_seconds = max(self._earlier_seconds, seconds)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):  # the last line, cut off
                return
            raise ConfigError(
                f"each line of metrics.jsonl must be a record, got {shortened(str(line.strip()), 100)}, line {number} "
                f"of {self._path}; repair or remove that line"
            ) from error

    def write(self, env_steps: int, values: Mapping[str, float | None]) -> None:
        """Adds one record. It is in metrics.jsonl when this returns.

        Args:
          env_steps: environment steps of the record, over all lanes: TensorBoard's x axis.
          values: any numbers by name. None or NaN if there is nothing to report yet.
        """
        wall_seconds = round(self._earlier_seconds + time.monotonic() - self._began, 3)
        line = strict_json({"env_steps": env_steps, "wall_seconds": wall_seconds, **values}) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            if not self._has_failed:
                logger.warning(
                    "%s can't be written (%s); the run goes on without these records. Free space or fix permissions "
                    "there, and the next ones will be written",
                    self._path,
                    error.strerror,
                )
            self._has_failed = True
        self._loggers.write(env_steps, finite(values))

    def close(self) -> None:
        """Finishes the file, and ends the loggers. Idempotent."""
        self._loggers.end(self.summary)
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        """Appends the whole line, or nothing of it."""
        self._file = self._file or open_to_append(self._path)
        descriptor, rest = self._file.fileno(), line
        size = os.fstat(descriptor).st_size
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
