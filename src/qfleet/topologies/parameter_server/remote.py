"""The parts of `qfleet.topologies.parameter_server`, as they run on Ray."""

from typing import Any

import numpy as np

from qfleet.topologies.fleet.actor import Chunk, ChunkStats
from qfleet.topologies.fleet.replay_shard import ReplayShard, ShardStats
from qfleet.topologies.fleet.supervisor import InRemoteProcess
from qfleet.topologies.parameter_server.server_shard import ServerShard
from qfleet.topologies.parameter_server.worker import GradientRoom, Worker


class RemoteServerShard(InRemoteProcess, ServerShard):
    """A shard of the server in a process of its own."""


class RemoteReplayShard(InRemoteProcess, ReplayShard):
    """A shard of the replay that all workers share, in a process of its own."""


class RemoteWorker(InRemoteProcess, Worker):
    """A worker in a process of its own.

    What is pulled comes along with what is asked for, as references that Ray fetches before it begins, or while the
    worker still acts; or as places in memory, and then references come last to what must have happened before.
    """

    def pull_and_act(
        self, version: int, exploration: float, num_handed: int, *handed: Any
    ) -> tuple[tuple[ChunkStats, ShardStats | None], Chunk | None]:
        """Pulls the first of what comes last, and returns what `act` does, the chunk by itself."""
        self.pull(version, handed[:num_handed])
        report, stock, chunk = self.act(exploration)
        return (report, stock), chunk

    def pull_and_learn(
        self, version: int, importance_exponent: float, room: GradientRoom, num_handed: int, *handed: Any
    ) -> Any:
        """Pulls the first of what comes last, and returns what `gradient` does."""
        self.pull(version, handed[:num_handed])
        return _alone(self.gradient(importance_exponent, room))

    def pull_and_learn_of(
        self, version: int, places: list[np.ndarray], room: GradientRoom, num_handed: int, *parts_and_handed: Any
    ) -> Any:
        """Pulls, and returns what `gradient_of` does; its parts come first of what comes last."""
        num_parts = len(places)
        self.pull(version, parts_and_handed[num_parts : num_parts + num_handed])
        return _alone(self.gradient_of(places, parts_and_handed[:num_parts], room))


def _alone(results: tuple[Any, ...]) -> Any:
    """Returns one result by itself, as Ray wants it."""
    return results if len(results) > 1 else results[0]
