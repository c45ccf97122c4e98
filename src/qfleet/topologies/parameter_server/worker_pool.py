"""The workers, as the director knows them: the parameters that each has been sent, and the replay that each keeps."""

import dataclasses
import logging
from typing import Any

import numpy as np

from qfleet.config import ActorPool
from qfleet.core.replay import SavedReplay
from qfleet.topologies.fleet.actors_director import PooledActor
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import EMPTY_SHARD, ShardStats
from qfleet.topologies.fleet.replay_shares import share_of
from qfleet.topologies.fleet.supervisor import RemoteProcess, Supervisor
from qfleet.topologies.parameter_server.remote import Pull, RemoteWorker
from qfleet.topologies.parameter_server.sharded_server import NewestParameters

logger = logging.getLogger("qfleet")


@dataclasses.dataclass
class PooledWorker(PooledActor):
    """What the director knows of a worker."""

    is_learning: bool = False
    """Whether it was asked for a gradient that has not arrived yet."""
    version: int = -1
    """Version of the parameters that it is known to have."""
    target_version: int = -1
    """The same of the target network."""
    stats: ShardStats = EMPTY_SHARD
    """Contents of its own replay."""

    def next_pull(self, newest: NewestParameters) -> Pull:
        """Returns what the worker must pull to have the newest parameters: all that it isn't known to have.

        What was sent to it and not answered yet may still be lost on its way, and a later pull must not rely on it.
        """
        pull = Pull(newest.version)
        if self.version != newest.version:
            pull = pull._replace(params=newest.params)
            if self.target_version != newest.target_version:
                pull = pull._replace(target_params=newest.target_params)
        return pull

    def has_pulled(self, newest: NewestParameters) -> None:
        """Notes that the worker has these parameters."""
        self.version, self.target_version = newest.version, newest.target_version

    def pull_all_again(self) -> None:
        """Has `next_pull` include everything, because it isn't known what the worker has."""
        self.version = self.target_version = -1


class WorkerReplays:
    """The replays that workers keep for themselves. For the director's thread."""

    def __init__(self, workers: list[PooledWorker], pool: ActorPool, supervisor: Supervisor) -> None:
        """Manages the replays of these workers.

        Args:
          workers: the workers. More of them may be added to the list later.
          pool: their number and their lanes.
          supervisor: supervisor of the workers.
        """
        self._workers, self._pool, self._supervisor = workers, pool, supervisor

    @property
    def processes(self) -> list[RemoteProcess]:
        """The processes that keep the replays."""
        return [worker.process for worker in self._workers]

    @property
    def num_transitions(self) -> int:
        """Transitions in all of them."""
        return sum(worker.stats.num_transitions for worker in self._workers)

    def give(self, i: int, saved: SavedReplay) -> int:
        """Has a worker continue with its lanes of a saved replay, and returns how many transitions they hold."""
        worker, own = self._workers[i], share_of(saved, self._pool, i)

        def restored(stats: ShardStats) -> None:
            worker.stats = stats

        self._supervisor.submit(worker.process, RemoteWorker.go_on_from, Reference(own), on_reply=restored)
        return int(np.sum(np.asarray(own.leaves) > 0))

    def refill(self, i: int, newest: tuple[SavedReplay, dict[str, Any]] | None) -> None:
        """Has a worker that was replaced continue with its lanes of the newest checkpoint.

        Args:
          i: number of the worker.
          newest: replay and counters of that checkpoint; None if there is none, and the worker begins with nothing.
        """
        worker, num_lost = self._workers[i], self._workers[i].stats.num_transitions
        num_found, source = 0, "there is no checkpoint that has them"
        if newest:
            saved, counters = newest
            num_found = self.give(i, saved)
            source = f"from the checkpoint at environment step {counters['env_steps']}"
        worker.stats = EMPTY_SHARD._replace(num_transitions=num_found)
        logger.warning("%s held %d transitions; %d are back: %s", worker.process.name, num_lost, num_found, source)
