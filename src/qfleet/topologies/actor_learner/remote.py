"""The processes of the actor-learner topology, as Ray runs them. The shards are `fleet.remote.RemoteReplayShard`."""

import numpy as np

from qfleet.core.types import Transition
from qfleet.topologies.actor_learner.learner import GlobalLearner, Leaves, UpdateResult
from qfleet.topologies.fleet.actor import Actor, Chunk, ChunkStats
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess


class RemoteActor(InRemoteProcess, Actor):
    """An actor in a process of its own."""

    def fetch_and_collect(
        self, version: int, params: Reference[Leaves], exploration: float
    ) -> tuple[ChunkStats, Reference[Chunk]]:
        """Takes parameters, unless the actor has them already, and returns the next chunk.

        Args:
          version: of the parameters.
          params: their leaves.
          exploration: epsilon of the actor.
        """
        if version != self.version:
            self.receive(version, params.value)
        stats, chunk = self.collect(exploration)
        return stats, Reference(chunk)


class RemoteLearner(InRemoteProcess, GlobalLearner):
    """The learner in a process of its own. Its methods do what those of `GlobalLearner` do, with references."""

    def learn_round(
        self, places: list[np.ndarray], parts: list[Reference[Transition]]
    ) -> tuple[UpdateResult, list[Reference[np.ndarray]]]:
        """Does what `learn` does. Each shard of the replay gets a reference to its own priorities."""
        result, priorities = self.learn(places, *(part.value for part in parts))
        return result, [Reference(priority) for priority in priorities]

    def publish(self) -> tuple[int, Reference[Leaves]]:
        """Does what `params` does, for actors."""
        learner_steps, leaves = self.params()
        return learner_steps, Reference(leaves)

    def saved_params(self) -> Reference[tuple[int, Leaves]]:
        """Does what `params` does."""
        return Reference(self.params())

    def saved(self) -> Reference[tuple[int, Leaves]]:
        """Does what `state` does."""
        return Reference(self.state())

    def go_on_from(self, learner_steps: int, leaves: Reference[Leaves]) -> None:
        """Does what `restore` does."""
        self.restore(learner_steps, leaves.copy())
