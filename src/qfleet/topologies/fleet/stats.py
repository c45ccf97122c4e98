"""What happened in a run on Ray since the last record."""

import numpy as np

from qfleet.topologies.fleet.actor import ChunkStats


class DirectorStats:
    """What happened since the last record."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Time that they cover."""
        self.end = (0, 0)
        """Environment steps and learner steps in total, at the end of that time."""


class PoolStats(DirectorStats):
    """What happened in a pool of actors since the last record."""

    def __init__(self, num_actors: int, groups: tuple[str, ...]) -> None:
        """Begins with nothing.

        Args:
          num_actors: in the pool.
          groups: names of the groups of processes whose busy time is measured.
        """
        super().__init__()
        self.env_steps = self.learner_steps = self.num_failures = 0
        self.actor_env_steps = np.zeros(num_actors, np.int64)
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.q_mean: list[float] = []
        self.staleness: list[int] = []
        self.received_bytes = 0
        """Parameters received by all actors."""
        self.busy_seconds = dict.fromkeys(groups, 0.0)
        """Time that the processes of each group have worked, summed over them."""

    def count_chunk(self, actor: int, env_steps: int, chunk: ChunkStats) -> None:
        """Counts a chunk that the replay has stored."""
        self.env_steps += env_steps
        self.actor_env_steps[actor] += env_steps
        self.returns += chunk.returns
        self.lengths += chunk.lengths
        self.q_mean.append(chunk.q_mean)
        self.num_failures += chunk.num_failures
        self.received_bytes += chunk.received_bytes
