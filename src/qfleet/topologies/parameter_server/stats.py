"""What happened in a parameter server since the last record."""

from qfleet.topologies.fleet.stats import PoolStats
from qfleet.topologies.parameter_server.step_queue import Admission
from qfleet.topologies.parameter_server.worker import GradientStats


class ServerStats(PoolStats):
    """What happened since the last record. Losses, TD errors and staleness are those of gradients that were applied."""

    def __init__(self, num_workers: int) -> None:
        """Begins with nothing."""
        super().__init__(num_workers, ("workers", "server", "shards"))
        self.losses: list[float] = []
        self.td_errors: list[float] = []
        self.num_gradients = {"applied": 0, "stale": 0, "outlier": 0}
        self.pushed_bytes = 0

    def count_gradient(self, result: GradientStats, num_bytes: int, admission: Admission) -> None:
        """Counts a gradient that has arrived. Those that are applied count once their step is requested."""
        self.pushed_bytes += num_bytes
        self.busy_seconds["workers"] += result.busy_seconds
        if admission.decision == "applied":
            self.staleness.append(admission.staleness)
            self.losses.append(result.loss)
            self.td_errors.append(result.td_error)
        else:
            self.num_gradients[admission.decision] += 1
