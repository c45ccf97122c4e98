"""Reads the metrics of a run back: one NumPy column per name."""

import array
import json
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qfleet.config import ConfigError
from qfleet.runtime.run_files import MAX_LINE_BYTES, UnusableFile, open_regular, shortened

MAX_COLUMNS = 2_000
"""Most names that the metrics of one run may have. A run has some thirty, and a few for each of its seeds."""

MAX_DAMAGED_NAMED = 20
"""Most damaged lines that are named; the others are only counted."""


class Metrics(dict[str, np.ndarray]):
    """The records of a run by column. It is a dictionary, which pandas.DataFrame and polars.DataFrame take as it is.

    Every column has one value per record, in the order of the file: `env_steps` is int64, all others are float64. A
    value is NaN where the record has none, or none that is finite. Every run has `env_steps` and `wall_seconds`.
    """

    num_damaged: int = 0
    """Number of lines that hold no record. They are left out."""
    damaged: tuple[str, ...] = ()
    """The first of these lines: each one's number, and what is wrong with it."""

    @property
    def num_records(self) -> int:
        """Number of records."""
        return len(self["env_steps"])


class MetricsReader:
    """Reads a metrics.jsonl, and later only what was appended to it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Reads nothing yet."""
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._columns: dict[str, array.array] = {"env_steps": array.array("q"), "wall_seconds": array.array("d")}
        self._num_records = self._num_lines = self._num_damaged = 0
        self._damaged: list[str] = []
        self._position = 0
        self._inode: int | None = None

    def read(self) -> Metrics:
        """Returns all records of the file. Lines that hold no record are left out, and named in `damaged`.

        A last line without an end is being written just now, and is left out without a word. A file that doesn't exist
        holds no records. If the file was replaced or shortened, because the run went back to a checkpoint, it is read
        anew.

        Raises:
          ConfigError: if there is something else than a readable file.
        """
        try:
            with open_regular(self._path) as file:
                self._read_on(file)
        except FileNotFoundError:
            self._begin()
        except (OSError, UnusableFile) as error:
            raise ConfigError(
                f"metrics.jsonl must be a readable file, got {self._path} ({error}); move it away"
            ) from error
        return self._metrics()

    def _read_on(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._position:
            self._begin()
            self._inode = status.st_ino
        file.seek(self._position)
        while (line := file.readline(MAX_LINE_BYTES + 1)).endswith(b"\n"):
            self._num_lines += 1
            self._position += len(line)
            try:
                self._add(_record_of(line, self._columns))
            except ValueError as error:
                self._num_damaged += 1
                if self._num_damaged <= MAX_DAMAGED_NAMED:
                    self._damaged.append(f"line {self._num_lines}: {error}")
        if len(line) > MAX_LINE_BYTES:
            raise UnusableFile(f"a line must hold at most {MAX_LINE_BYTES:,} bytes, got more")

    def _add(self, record: dict[str, float]) -> None:
        for name, value in record.items():
            column = self._columns.setdefault(name, array.array("d"))
            if len(column) < self._num_records:
                column.extend([math.nan] * (self._num_records - len(column)))
            column.append(value)
        self._num_records += 1

    def _metrics(self) -> Metrics:
        metrics = Metrics()
        for name, column in self._columns.items():
            column.extend([math.nan] * (self._num_records - len(column)))
            values = np.array(column)
            metrics[name] = values if values.dtype == np.int64 else np.where(np.isfinite(values), values, math.nan)
        metrics.num_damaged, metrics.damaged = self._num_damaged, tuple(self._damaged)
        return metrics


_NUMBERS = {int, float, type(None)}


def _record_of(line: bytes, columns: dict[str, array.array]) -> dict[str, float]:
    """Returns the record that a line holds, with NaN in place of null.

    Raises:
      ValueError: if the line holds something else.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a record must be strict JSON, got {_shown(line)}") from error
    if not isinstance(record, dict) or not set(map(type, record.values())) <= _NUMBERS:
        raise ValueError(f"a record must be a JSON object of numbers, got {_shown(line)}")
    steps, seconds = record.get("env_steps"), record.get("wall_seconds")
    if type(steps) is not int or not 0 <= steps < 2**63 or seconds is None:
        raise ValueError(f"a record must have env_steps and wall_seconds, got {_shown(line)}")
    if len(record) > MAX_COLUMNS or len(columns.keys() | record.keys()) > MAX_COLUMNS:
        raise ValueError(f"a run must have at most {MAX_COLUMNS} metrics, got {_shown(line)}")
    try:
        numbers = {name: math.nan if value is None else float(value) for name, value in record.items()}
    except OverflowError as error:
        raise ValueError(f"each number must be one of 64 bits, got {_shown(line)}") from error
    return {**numbers, "env_steps": steps}


def _shown(line: bytes) -> str:
    return shortened(line.decode(errors="replace"), 60)
