"""The processes of the actor-learner topology, as Ray runs them."""

from typing import Any

import numpy as np
import ray

from qfleet.core.types import Transition
from qfleet.topologies.actor_learner.learner import GlobalLearner
from qfleet.topologies.fleet.actor import Actor, Chunk, ChunkStats
from qfleet.topologies.fleet.replay_shard import ReplayShard
from qfleet.topologies.fleet.supervisor import InRemoteProcess


class RemoteActor(InRemoteProcess, Actor):
    """An actor in a process of its own."""

    def fetch_and_collect(self, version: int, box: list[Any], exploration: float) -> tuple[ChunkStats, Chunk]:
        """Fetches the parameters of a version, unless the actor has them already, and returns the next chunk.

        Args:
          version: of the parameters.
          box: holds a reference to the parameters. Ray would fetch a reference that isn't in a list before the call.
          exploration: epsilon of the actor.
        """
        if version != self.version:
            self.receive(version, ray.get(box[0]))
        return self.collect(exploration)


class RemoteShard(InRemoteProcess, ReplayShard):
    """A shard of the replay in a process of its own."""


class RemoteLearner(InRemoteProcess, GlobalLearner):
    """The learner in a process of its own."""

    def learn(self, places: list[np.ndarray], *parts: Transition) -> tuple[Any, ...]:
        """Returns the result of a round and then, as a value of its own for each shard, that shard's TD errors.

        Because they are separate values, each shard fetches only its own errors.
        """
        result, errors = super().learn(places, *parts)
        return result, *errors
