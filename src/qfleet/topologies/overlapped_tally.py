"""What `qfleet.topologies.overlapped` counts while it trains: episodes, values, staleness, failures."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qfleet.topologies.overlapped_program import HostRow


@dataclasses.dataclass
class Episodes:
    """Training episodes under way, `[lanes]` each."""

    returns: np.ndarray
    steps: np.ndarray


class Tally:
    """What the rows of one chunk tell of themselves."""

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self.returns: list[float] = []
        """Of the episodes that ended."""
        self.lengths: list[int] = []
        self.q_max: list[float] = []
        self.staleness: list[int] = []
        self.num_failures = 0

    def add(self, row: HostRow, q_max: np.ndarray, has_ended: np.ndarray, failed: np.ndarray) -> None:
        """Adds a row; its no-step lanes begin a new episode after it."""
        episodes = self._episodes
        episodes.returns = np.where(row.no_step, 0.0, episodes.returns + row.reward)
        episodes.steps = np.where(row.no_step, 0, episodes.steps + 1)
        self.returns += episodes.returns[has_ended].tolist()
        self.lengths += episodes.steps[has_ended].tolist()
        self.q_max.append(float(np.mean(q_max)))
        self.num_failures += int(np.sum(failed))


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean, None of nothing."""
    return float(np.mean(values)) if values else None
