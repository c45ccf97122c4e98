"""The metrics of a run whose seeds are runs of their own, made from theirs.

A run that trains all seeds in one program writes the means over seeds, and each seed's return. So does this one, with
rows in place of its chunks: the seeds' own records, taken together over equal stretches of environment steps.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qfleet.runtime.loggers import LoggedRun, Loggers
from qfleet.runtime.run_directory import strict_json, write_atomically
from qfleet.runtime.run_files import UnusableFile, open_regular, parse_json
from qfleet.runtime.tensorboard import TensorBoardLogger

NUM_ROWS = 100
"""Number of rows of training in the whole run. The seeds' own folders have every record."""

_LAST = ("env_steps", "wall_seconds", "learner_steps")
"""Columns of which the newest value of a seed counts, and then the mean over seeds."""

_WEIGHTS = {"episode_return_mean": "num_episodes", "episode_length_mean": "num_episodes"}
"""Columns that are means over as many values as another column says."""

_PER_SEED = ("episode_return_mean", "eval_return_mean")
"""Columns that each seed has one of its own of, named by its index."""

Row = dict[str, float]


class _Cell:
    """What a seed has recorded over one stretch of environment steps."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last: Row = {}

    def add(self, record: Row) -> None:
        for name, value in record.items():
            if name in _LAST:
                self._last[name] = value
            else:
                weight = record.get(_WEIGHTS.get(name, ""), 1.0)
                self._sums[name] = self._sums.get(name, 0.0) + value * weight
                self._weights[name] = self._weights.get(name, 0.0) + weight

    def row(self) -> Row:
        """Returns sums of counts, and means of the rest."""
        values = {
            name: round(total) if _is_count(name) else total / self._weights[name]
            for name, total in self._sums.items()
            if _is_count(name) or self._weights[name]
        }
        return self._last | values


class SeedRecords:
    """The records of one seed's metrics.jsonl, over stretches of environment steps. `read` adds those that are new."""

    def __init__(self, path: Path, stretch_env_steps: int, eval_period_env_steps: int) -> None:
        """Reads nothing yet; there may be no file.

        Args:
          path: the file.
          stretch_env_steps: environment steps of one row of training.
          eval_period_env_steps: environment steps between evaluations.
        """
        self._path, self._stretch, self._period = path, stretch_env_steps, eval_period_env_steps
        self._forget()

    def _forget(self) -> None:
        self._file_id: tuple[int, int] | None = None
        self._position = 0
        self.env_steps = 0
        """Environment steps of the newest record."""
        self.training: dict[int, _Cell] = {}
        """By the number of the stretch."""
        self.evaluations: dict[tuple[int, int], _Cell] = {}
        """By the number of periods before the evaluation, and its number among those after as many."""

    def read(self) -> bool:
        """Reads what is new, and returns whether there was anything. A line that is damaged is left out."""
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                file_id = (status.st_dev, status.st_ino)
                if file_id != self._file_id or status.st_size < self._position:
                    self._forget()  # the seed went back to a checkpoint
                    self._file_id = file_id
                file.seek(self._position)
                new = file.read()
        except (OSError, UnusableFile):
            return False
        whole = new[: new.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            if (record := _record_of(line)) is not None:
                self._add(record)
        return bool(whole)

    def _add(self, record: Row) -> None:
        env_steps = self.env_steps = int(record["env_steps"])
        where = {name: record[name] for name in _LAST if name in record}
        evaluation = {name: value for name, value in record.items() if name.startswith("eval_")}
        training = {name: value for name, value in record.items() if name not in evaluation}
        if training.keys() - set(_LAST):
            self.training.setdefault((env_steps - 1) // self._stretch, _Cell()).add(training)
        if evaluation:
            number = env_steps // self._period
            again = sum(before == number for before, _ in self.evaluations)  # the last one of a run may come early
            self.evaluations[number, again] = cell = _Cell()
            cell.add(where | evaluation)


def combined_rows(seeds: Sequence[SeedRecords], kept: Collection[int] = ()) -> list[Row]:
    """Returns the rows of all seeds together, in the order of their environment steps.

    Args:
      seeds: the records of each seed.
      kept: indices of the seeds that have ended because they reached the return to stop at. As in a run in one program,
        each stays as it is: later evaluations take over its last one.
    """
    stretches = [{number: cell.row() for number, cell in seed.training.items()} for seed in seeds]
    rows = [
        _together({i: own[stretch] for i, own in enumerate(stretches) if stretch in own})
        for stretch in sorted(set().union(*stretches))
    ]
    evaluations = [{number: cell.row() for number, cell in seed.evaluations.items()} for seed in seeds]
    for number in sorted(set().union(*evaluations)):
        found = {i: own[number] for i, own in enumerate(evaluations) if number in own}
        where = _mean_of(found, _LAST)
        for i in kept:
            if evaluations[i] and number > (last := max(evaluations[i])):
                found[i] = evaluations[i][last] | where
        rows.append(_together(dict(sorted(found.items()))))
    clocks = [
        sorted(_time(row) for row in (*a.values(), *b.values())) for a, b in zip(stretches, evaluations, strict=True)
    ]
    for row in rows:  # a row may be of some seeds only, but time goes on evenly for all of them
        times = []
        for clock in filter(None, clocks):
            env_steps, seconds = np.array(clock).T
            times.append(np.interp(row["env_steps"], env_steps, seconds))
        row["wall_seconds"] = round(float(np.mean(times)), 3)
    return sorted(rows, key=lambda row: row["env_steps"])


def _time(row: Row) -> tuple[float, float]:
    return row["env_steps"], row["wall_seconds"]


def _mean_of(rows: dict[int, Row], names: Collection[str]) -> Row:
    """Returns the mean over seeds of some columns, as whole numbers where they count steps."""
    means = {}
    for name in names:
        values = [row[name] for row in rows.values() if name in row]
        if values:
            mean = sum(values) / len(values)
            means[name] = round(mean) if name.endswith("_steps") else round(mean, 3) if name in _LAST else mean
    return means


def _together(rows: dict[int, Row]) -> Row:
    """Returns one row from those of some seeds, by index."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name not in _LAST))
    together = _mean_of(rows, [*_LAST, *(name for name in names if not _is_count(name))])
    for name in filter(_is_count, names):
        together[name] = sum(row.get(name, 0) for row in rows.values())
    for name in _PER_SEED:
        together |= {f"{name}_seed_{i}": row[name] for i, row in rows.items() if name in row}
    return together


def _is_count(name: str) -> bool:
    return name.startswith(("num_", "eval_num_"))


def _record_of(line: bytes) -> Row | None:
    """Returns the numbers of a record, or None if the line isn't one."""
    try:
        record: Any = parse_json(line)
    except UnusableFile:
        return None
    if not isinstance(record, dict):
        return None
    numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
    return numbers if numbers.get("env_steps", 0) > 0 and "wall_seconds" in numbers else None


class CombinedMetrics:
    """Writes metrics.jsonl and TensorBoard's events of a run from those of its seeds."""

    def __init__(self, path: Path, seeds: Sequence[SeedRecords]) -> None:
        """Writes nothing yet.

        Args:
          path: the metrics.jsonl to write.
          seeds: the records of each seed.
        """
        self._path, self._seeds = path, seeds
        resumed_at = -1  # a run that is resumed writes all rows again
        self._events = Loggers(LoggedRun(path.parent, "", {}, resumed_at), [("TensorBoard", TensorBoardLogger())])
        self._num_logged = 0
        self._kept: set[int] = set()
        self.rows: list[Row] = []
        """The rows as of the last `write`."""

    def write(self, kept: Collection[int], pending: Collection[int]) -> None:
        """Brings metrics.jsonl up to date, and TensorBoard as far as no seed will change a row any more.

        Args:
          kept: as for `combined_rows`.
          pending: indices of the seeds that go on.

        Raises:
          OSError: if metrics.jsonl can't be written.
        """
        are_new = [seed.read() for seed in self._seeds]
        if any(are_new) or set(kept) != self._kept:
            self._kept = set(kept)
            self.rows = combined_rows(self._seeds, kept)
            write_atomically(self._path, "".join(strict_json(row) + "\n" for row in self.rows))
        until = min((self._seeds[i].env_steps for i in pending), default=None)
        while self._num_logged < len(self.rows):
            row = dict(self.rows[self._num_logged])
            if until is not None and row["env_steps"] > until:
                break
            del row["wall_seconds"]
            self._events.write(int(row.pop("env_steps")), row)
            self._num_logged += 1

    def best(self) -> tuple[int, float] | None:
        """Returns environment steps and mean of the best evaluation that all seeds have played, if there is one."""
        names = [f"eval_return_mean_seed_{i}" for i in range(len(self._seeds))]
        found = [
            (row["eval_return_mean"], -row["env_steps"]) for row in self.rows if all(name in row for name in names)
        ]
        return (-int(max(found)[1]), max(found)[0]) if found else None

    def close(self) -> None:
        """Finishes TensorBoard's events."""
        self._events.end({})
