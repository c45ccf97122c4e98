"""What `qfleet.topologies.overlapped` counts while it trains: episodes, values, staleness, failures."""

import numpy as np

from qfleet.topologies.acting import Episodes
from qfleet.topologies.overlapped.programs import HostRow


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
        returns, lengths = self._episodes.add(row.reward, row.no_step, has_ended)
        self.returns += returns
        self.lengths += lengths
        self.q_max.append(float(np.mean(q_max)))
        self.num_failures += int(np.sum(failed))
