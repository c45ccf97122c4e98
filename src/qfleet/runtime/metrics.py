"""The metrics of a run: one line of JSON per progress record, and the same numbers for TensorBoard."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TextIO

from qfleet.config import ConfigError
from qfleet.runtime.process import seconds_since_process_start
from qfleet.runtime.run_directory import RunDirectory, strict_json
from qfleet.runtime.run_files import UnusableFile, open_to_append, parse_json, read_lines, shortened, temporary_of

_BEGINNING = b'{"env_steps": '
"""How every line begins."""


class MetricsWriter:
    """Appends progress records to metrics.jsonl and to TensorBoard's event file. Use it as a context manager.

    A line holds `env_steps`, `wall_seconds` and the record's values. A value that isn't finite is null. `wall_seconds`
    is the age of the process, plus the time of the processes that this one resumed from. A thread of its own imports
    TensorBoard's writer and writes the events, so that this never delays training.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._file: TextIO | None = None
        self._purge_step: int | None = None
        self._earlier_seconds = 0.0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorboard")
        self._events: Any = None  # a tensorboardX SummaryWriter; only the worker may touch it
        self._last: Future[None] | None = None

    def truncate_after(self, env_steps: int) -> None:
        """Drops the records after `env_steps`, because a run that resumes from there will write them again.

        Also drops the last line if it was cut off in the middle. Call this before the first `write`.

        Raises:
          ConfigError: if any other line isn't a record.
        """
        path = self._run.metrics_path
        try:
            lines = read_lines(path)
            first = next(lines, b"")
        except FileNotFoundError:
            first, lines = b"", iter(())
        except (OSError, UnusableFile) as error:
            raise ConfigError(f"metrics.jsonl must be a readable file, got {path} ({error}); move it away") from error
        if first:
            temporary = temporary_of(path)
            with temporary.open("xb") as file:
                file.writelines(self._records_until(env_steps, itertools.chain([first], lines)))
            os.replace(temporary, path)
        self._purge_step = env_steps + 1

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
                f"of {self._run.metrics_path}; repair or remove that line"
            ) from error

    def write(self, env_steps: int, values: Mapping[str, float | None]) -> None:
        """Adds one record. It is in metrics.jsonl when this returns.

        Args:
          env_steps: environment steps of the record, over all lanes: TensorBoard's x axis.
          values: any numbers by name. None or NaN if there is nothing to report yet.
        """
        if self._file is None:
            self._file = open_to_append(self._run.metrics_path)
        wall_seconds = round(self._earlier_seconds + seconds_since_process_start(), 3)
        self._file.write(strict_json({"env_steps": env_steps, "wall_seconds": wall_seconds, **values}) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        if self._last is not None and self._last.done():
            self._last.result()  # raises an error of the worker now, rather than at the end of the run
        self._last = self._worker.submit(
            self._write_events, env_steps, {name: value for name, value in numbers.items() if math.isfinite(value)}
        )

    def close(self) -> None:
        """Finishes both files. Idempotent."""
        if self._file is None or self._last is None:
            return
        self._file.close()
        self._file = None
        closing = self._worker.submit(self._close_events)
        self._worker.shutdown()
        self._last.result()
        closing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_events(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._run.path), purge_step=self._purge_step, flush_secs=10)
        for name, value in numbers.items():
            self._events.add_scalar(name, value, env_steps)

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
