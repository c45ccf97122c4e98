"""The parts of `qfleet.topologies.parameter_server`, as they run on Ray."""

from typing import Any

import numpy as np

from qfleet.core.types import Transition
from qfleet.topologies.collecting import Chunk, Report
from qfleet.topologies.parameter_server_shard import ServerShard
from qfleet.topologies.parameter_server_worker import Worker
from qfleet.topologies.ray_parts import Remote
from qfleet.topologies.replay_shard import ReplayShard, Stock


class RemoteServerShard(Remote, ServerShard):
    """A shard of the server in a process of its own."""


class RemoteReplayShard(Remote, ReplayShard):
    """A shard of the replay that all workers share, in a process of its own."""


class RemoteWorker(Remote, Worker):
    """A worker in a process of its own.

    What is pulled comes along with what is asked for, as references that Ray fetches before it begins, or while the
    worker still acts.
    """

    def pull_and_act(
        self, version: int, exploration: float, *vectors: np.ndarray
    ) -> tuple[tuple[Report, Stock | None], Chunk | None]:
        """Pulls, and returns what `act` does, the chunk by itself."""
        self.pull(version, vectors)
        report, stock, chunk = self.act(exploration)
        return (report, stock), chunk

    def pull_and_learn(self, version: int, importance_exponent: float, *vectors: np.ndarray) -> tuple[Any, ...]:
        """Pulls, and returns what `gradient` does."""
        self.pull(version, vectors)
        return self.gradient(importance_exponent)

    def pull_and_learn_of(
        self, version: int, places: list[np.ndarray], num_vectors: int, *vectors_and_parts: np.ndarray | Transition
    ) -> tuple[Any, ...]:
        """Pulls, and returns what `gradient_of` does; `num_vectors` of what comes last are pulled."""
        vectors: Any = vectors_and_parts[:num_vectors]
        parts: Any = vectors_and_parts[num_vectors:]
        self.pull(version, vectors)
        return self.gradient_of(places, *parts)
