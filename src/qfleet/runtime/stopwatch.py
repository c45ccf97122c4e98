"""Wall time of training, by the part of a training step that took it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qfleet.runtime.records import Progress

OTHER = "other"
"""Name of the time that no part accounts for. Most of it is the host's own Python."""


class Stopwatch:
    """Adds up the wall time of functions by the part they belong to. It waits for the arrays of each call."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = (*parts, OTHER)
        self.start()

    def start(self) -> None:
        """Starts all parts from zero."""
        self._seconds = dict.fromkeys(self._parts, 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a version of `function` that waits until its arrays are ready and counts the time for `part`."""

        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(function(*arguments))
            self._seconds[part] += time.perf_counter() - started
            return result

        return run

    def split(self, seconds: float) -> dict[str, float]:
        """Returns how `seconds`, the wall time since `start`, divides over the parts and `OTHER`."""
        return {**self._seconds, OTHER: self._seconds[OTHER] + seconds - sum(self._seconds.values())}


@dataclasses.dataclass
class TimeShares:
    """Training time of a run, without evaluation, by the part that took it. Empty unless it was measured."""

    num_envs: int
    """Number of lanes."""
    num_rows: float = 0.0
    """Rows so far; a row is one step of every lane."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall time so far, by part."""

    def add(self, progress: Progress) -> None:
        """Adds the time of a record."""
        for part, seconds in (progress.part_seconds or {}).items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.num_rows += progress.new_env_steps / self.num_envs

    def summary(self) -> dict[str, dict[str, float] | None]:
        """Returns each part's share of the whole and its milliseconds per row, or None if nothing was measured."""
        if not self.seconds:
            return {"time_shares": None, "row_milliseconds": None}
        total = sum(self.seconds.values())
        return {
            "time_shares": {part: seconds / total for part, seconds in self.seconds.items()},
            "row_milliseconds": {part: 1e3 * seconds / self.num_rows for part, seconds in self.seconds.items()},
        }
