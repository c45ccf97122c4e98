"""The processes of the actor-learner topology, as Ray runs them. The shards are `fleet.remote.RemoteReplayShard`."""

from collections.abc import Mapping

import numpy as np

from qfleet.config import TrainConfig
from qfleet.core.types import Transition
from qfleet.topologies.actor_learner.learner import GlobalLearner, Leaves, UpdateResult
from qfleet.topologies.fleet.actor import Actor, Chunk, ChunkStats
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess


class RemoteActor(InRemoteProcess):
    """An `Actor` in a process of its own. A method calls the actor's method of the same name, and `collect` also
    `receive`.
    """

    def __init__(self, variables: Mapping[str, str], config: TrainConfig, number: int) -> None:
        """Makes an actor; `variables` are those of `InRemoteProcess`."""
        super().__init__(variables)
        self._actor = Actor(config, number)

    def begin(self, incarnation: int) -> None:
        """Starts the first episodes of the lanes."""
        self._actor.begin(incarnation)

    def collect(
        self, version: int, params: Reference[Leaves], exploration: float
    ) -> tuple[ChunkStats, Reference[Chunk]]:
        """Receives parameters, unless the actor has them already, and returns the next chunk.

        Args:
          version: of the parameters.
          params: their leaves.
          exploration: epsilon of the actor.
        """
        if version != self._actor.version:
            self._actor.receive(version, params.value)
        stats, chunk = self._actor.collect(exploration)
        return stats, Reference(chunk)


class RemoteLearner(InRemoteProcess):
    """A `GlobalLearner` in a process of its own. A method calls the learner's method of the same name, and `params`
    calls `publish`.
    """

    def __init__(self, variables: Mapping[str, str], config: TrainConfig) -> None:
        """Makes a learner; `variables` are those of `InRemoteProcess`."""
        super().__init__(variables)
        self._learner = GlobalLearner(config)

    def learn(
        self, places: list[np.ndarray], shares: list[Reference[Transition]]
    ) -> tuple[UpdateResult, list[Reference[np.ndarray]]]:
        """Takes the learner steps of one round. Each share has a reference of its own to its priorities."""
        result, priorities = self._learner.learn(places, *(share.value for share in shares))
        return result, [Reference(priority) for priority in priorities]

    def publish(self) -> tuple[int, Reference[Leaves]]:
        """Returns the learner steps taken so far, and the parameters, for the actors."""
        learner_steps, leaves = self._learner.publish()
        return learner_steps, Reference(leaves)

    def params(self) -> Reference[tuple[int, Leaves]]:
        """Returns what `publish` does as one value, for the run's process."""
        return Reference(self._learner.publish())

    def state(self) -> Reference[tuple[int, Leaves]]:
        """Returns the learner steps taken so far, and the leaves of the learner's state."""
        return Reference(self._learner.state())

    def restore(self, learner_steps: int, leaves: Reference[Leaves]) -> None:
        """Goes on from what `state` returned."""
        self._learner.restore(learner_steps, leaves.copy())
