"""Reads the metrics of a run back: one NumPy column per name."""

import array
import json
import math
from pathlib import Path

import numpy as np

from qfleet.config import ConfigError
from qfleet.runtime.run_files import UnusableFile, read_lines, shortened

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


def read_metrics_file(path: Path) -> Metrics:
    """Returns the records of a metrics.jsonl. Lines that hold no record are left out, and named in `damaged`.

    A line that is being written just now, and has no end yet, is left out without a word. A file that doesn't exist
    holds no records.

    Raises:
      ConfigError: if there is something else than a readable file.
    """
    columns: dict[str, array.array] = {"env_steps": array.array("q"), "wall_seconds": array.array("d")}
    num_records = num_damaged = 0
    damaged: list[str] = []
    try:
        for number, line in enumerate(read_lines(path), 1):
            try:
                record = _record_of(line, columns)
            except ValueError as error:
                if line.endswith(b"\n"):
                    num_damaged += 1
                    damaged += [f"line {number}: {error}"] if num_damaged <= MAX_DAMAGED_NAMED else []
                continue
            for name, value in record.items():
                column = columns.setdefault(name, array.array("d"))
                if len(column) < num_records:
                    column.extend([math.nan] * (num_records - len(column)))
                column.append(value)
            num_records += 1
    except FileNotFoundError:
        pass
    except (OSError, UnusableFile) as error:
        raise ConfigError(f"metrics.jsonl must be a readable file, got {path} ({error}); move it away") from error
    metrics = Metrics()
    for name, column in columns.items():
        column.extend([math.nan] * (num_records - len(column)))
        values = np.array(column)
        metrics[name] = values if values.dtype == np.int64 else np.where(np.isfinite(values), values, math.nan)
    metrics.num_damaged, metrics.damaged = num_damaged, tuple(damaged)
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
