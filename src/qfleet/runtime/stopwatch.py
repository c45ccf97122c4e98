"""Where the wall time of training goes, by part."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qfleet.runtime.records import Progress

OTHER = "other"
"""What no part accounts for: the host's own Python, mostly."""


class Stopwatch:
    """Adds up the wall time of functions, each waited for, by the part that they belong to."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = (*parts, OTHER)
        self.start()

    def start(self) -> None:
        """Begins anew, from zero."""
        self._seconds = dict.fromkeys(self._parts, 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function`, which now returns once its arrays are ready, and counts for `part`."""

        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(function(*arguments))
            self._seconds[part] += time.perf_counter() - started
            return result

        return run

    def split(self, seconds: float) -> dict[str, float]:
        """Returns how the wall time since `start`, `seconds` in all, splits into the parts and `OTHER`."""
        return {**self._seconds, OTHER: self._seconds[OTHER] + seconds - sum(self._seconds.values())}


@dataclasses.dataclass
class TimeShares:
    """Where a run's training time went, without evaluation; empty unless it was measured."""

    num_envs: int
    num_rows: float = 0.0
    """Steps of all lanes."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """By part."""

    def add(self, progress: Progress) -> None:
        """Adds a record's time."""
        for part, seconds in (progress.part_seconds or {}).items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.num_rows += progress.new_env_steps / self.num_envs

    def summary(self) -> dict[str, dict[str, float] | None]:
        """Returns shares of the whole and milliseconds per row, by part; None if nothing was measured."""
        if not self.seconds:
            return {"time_shares": None, "row_milliseconds": None}
        total = sum(self.seconds.values())
        return {
            "time_shares": {part: seconds / total for part, seconds in self.seconds.items()},
            "row_milliseconds": {part: 1e3 * seconds / self.num_rows for part, seconds in self.seconds.items()},
        }
