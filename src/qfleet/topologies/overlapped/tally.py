"""What `qfleet.topologies.overlapped` counts while it trains: episodes, values, staleness, failures."""

import numpy as np

from qfleet.runtime.host_acting import ReceivedRow


class Tally:
    """What the rows of one chunk tell of themselves."""

    def __init__(self) -> None:
        self.returns: list[float] = []
        """Of the episodes that ended."""
        self.lengths: list[int] = []
        self.q_max: list[float] = []
        self.staleness: list[int] = []
        self.num_failures = 0

    def add(self, row: ReceivedRow, q_max: np.ndarray) -> None:
        """Adds a row, and the greatest values of the observations acted on."""
        self.returns += row.returns
        self.lengths += row.lengths
        self.q_max.append(float(np.mean(q_max)))
        self.num_failures += row.num_failures
