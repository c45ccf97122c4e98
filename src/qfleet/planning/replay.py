"""The shards of a simulated replay: what they hold, and what they reply."""

import numpy as np

from qfleet.config import ActorPool, TrainConfig
from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.messages import CallRequest, ProcessId
from qfleet.topologies.fleet.replay_shard import InsertReply, SampleReply, ShardStats
from qfleet.topologies.fleet.sharded_replay import Insert, SampleShare

NO_EPISODES = ChunkStats([], [], 0.0, 0, 0.0, 0)
"""Statistics of a chunk in which no episode ended."""


class SimulatedReplay:
    """Counts the rows of each shard, by its number."""

    def __init__(self, config: TrainConfig, pool: ActorPool) -> None:
        """Begins with empty shards."""
        self._steps_per_chunk = pool.rows_per_chunk * pool.lanes_per_actor
        self._missing = pool.lanes_per_actor * config.agent.rows_after_start
        self._capacity = config.agent.replay_capacity // pool.num_shards
        self._num_steps = np.zeros(pool.num_shards, np.int64)
        self._actors = [max(1, len(pool.actors_of(i))) for i in range(pool.num_shards)]

    def stats(self, shard: int) -> ShardStats:
        """Returns what a shard holds: the newest rows of each lane can't be drawn yet."""
        number = max(0, min(int(self._num_steps[shard]), self._capacity) - self._missing * self._actors[shard])
        return ShardStats(float(number), number, 0.0)

    def store(self, shard: int) -> ShardStats:
        """Stores a chunk."""
        self._num_steps[shard] += self._steps_per_chunk
        return self.stats(shard)

    def lose(self, process: ProcessId) -> None:
        """Empties the shard that a process held, if it held one."""
        if 0 <= process.number < len(self._num_steps):
            self._num_steps[process.number] = 0

    def reply(self, request: CallRequest) -> ShardStats | InsertReply | SampleReply:
        """Returns what a shard replies."""
        shard = request.process.number
        match request:
            case Insert():
                return InsertReply(self.store(shard), is_stored=True)
            case SampleShare():
                return SampleReply(self.stats(shard), request.results[0])
        return self.stats(shard)
