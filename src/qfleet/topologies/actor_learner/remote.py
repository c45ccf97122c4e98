"""The parts of a fleet, as they run on Ray."""

from typing import Any

import numpy as np
import ray

from qfleet.core.types import Transition
from qfleet.topologies.actor_learner.learner import GlobalLearner
from qfleet.topologies.fleet.actor import Actor, Chunk, Report
from qfleet.topologies.fleet.replay_shard import ReplayShard
from qfleet.topologies.fleet.supervisor import Remote


class RemoteActor(Remote, Actor):
    """An actor in a process of its own."""

    def fetch_and_collect(self, version: int, box: list[Any], exploration: float) -> tuple[Report, Chunk]:
        """Returns the next chunk; `box` holds a reference to the parameters, which are fetched if they are newer."""
        if version != self.version:
            self.receive(version, ray.get(box[0]))
        return self.collect(exploration)


class RemoteShard(Remote, ReplayShard):
    """A shard of the replay in a process of its own."""


class RemoteLearner(Remote, GlobalLearner):
    """The learner in a process of its own."""

    def learn(self, places: list[np.ndarray], *parts: Transition) -> tuple[Any, ...]:
        """Returns the lesson, then the errors of each part by themselves, for each shard to get its own only."""
        lesson, errors = super().learn(places, *parts)
        return lesson, *errors
