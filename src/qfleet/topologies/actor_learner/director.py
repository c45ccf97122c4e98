"""The director of actor-learner: it carries out what `machine.ActorLearnerMachine` decides.

It starts the processes, and calls the method that belongs to each request: see `_call`. It also reads parameters and
snapshots for other threads.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qfleet.config import ActorLearnerConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.actor_learner.learner import Leaves
from qfleet.topologies.actor_learner.machine import (
    LEARNER,
    ActorLearnerMachine,
    ActorLearnerStats,
    Collect,
    Learn,
    Publish,
    RestoreLearner,
)
from qfleet.topologies.actor_learner.remote import RemoteActor, RemoteLearner
from qfleet.topologies.fleet.machine_director import FleetDirector
from qfleet.topologies.fleet.messages import Begin, CallRequest, Started
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.remote_process import IN_LINE, ONE_CPU, RemoteProcess, default_resources
from qfleet.topologies.fleet.sharded_replay import Insert, RestoreReplay, SampleShare, SetPriorities


class ActorLearnerDirector(FleetDirector[ActorLearnerStats, ActorLearnerMachine]):
    """Coordinates the actors, the shards of the replay, and the learner."""

    _needs_in_words = "the learner, all shards of the replay and an actor"
    _resource_flags = "--actor-resources or --learner-resources"

    def __init__(
        self,
        config: TrainConfig,
        num_batches: int,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          num_batches: of one round.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads the replay of a checkpoint, as one replay for all shards.
        """
        self._config, self._topology = config, config.topology_as(ActorLearnerConfig)
        machine = ActorLearnerMachine(config, num_batches)
        super().__init__(self._topology, self._topology.actor_pool, machine, read_learner, read_replay)

    def _call(self, request: CallRequest[Any]) -> None:
        match request:
            case Begin():
                self._submit(request, RemoteActor.begin, request.incarnation)
            case Collect(broadcast=broadcast):
                self._submit(request, RemoteActor.collect, broadcast.version, broadcast.params, request.epsilon)
            case Insert(segment=segment, arrived=arrived):
                insert = RemoteReplayShard.insert
                self._submit(request, insert, segment, arrived.writer, arrived.chunk, is_repeated=True)
            case SampleShare():
                self._submit(
                    request, RemoteReplayShard.sample_share, request.number, request.seed, request.importance_exponent,
                    request.share, request.most,
                )  # fmt: skip
            case Learn(drawn=drawn):
                self._submit(request, RemoteLearner.learn, drawn.places, drawn.transitions)
            case SetPriorities():
                self._submit(request, RemoteReplayShard.set_priorities, request.number, request.priority)
            case Publish():
                self._submit(request, RemoteLearner.publish)
            case RestoreLearner():
                self._submit(request, RemoteLearner.restore, request.learner_steps, request.leaves)
            case RestoreReplay():
                self._submit(request, RemoteReplayShard.restore, request.saved)
            case _:
                raise TypeError(f"no method belongs to {request}")

    # --- For other threads ---

    def params(self) -> tuple[int, Leaves]:
        """Returns what `GlobalLearner.publish` returns, as soon as there is a learner."""
        return self._value_of(self._learner, RemoteLearner.params)

    def learner_state(self) -> tuple[int, Leaves]:
        """Returns what `GlobalLearner.state` returns.

        Raises:
          StateIsLost: if the learner is lost, and its replacement finds no node.
        """
        return self._value_of(self._learner, RemoteLearner.state, gives_up=True)

    def snapshots(self) -> Iterator[SavedReplay]:
        """Yields what each shard of the replay keeps, and so holds only one at a time in this process.

        Raises:
          StateIsLost: if a shard is lost, and its replacement finds no node.
        """
        for process in self._shards:
            yield self._value_of(process, RemoteReplayShard.snapshot, gives_up=True)

    # --- Processes and checkpoints ---

    @property
    def _learner(self) -> RemoteProcess[RemoteLearner]:
        return self._processes[LEARNER]

    def _make_stats(self) -> ActorLearnerStats:
        return ActorLearnerStats(self._topology.num_actors)

    def _saved_learner(self, learner: LearnerState) -> Reference[Leaves]:
        return Reference([np.asarray(leaf) for leaf in jax.tree.leaves(learner)])

    def _resources(self) -> list[Mapping[str, float]]:
        topology = self._topology
        each: Mapping[str, float] = topology.actor_resources or ONE_CPU
        return [each] * (topology.num_actors + topology.num_replay_shards) + [topology.learner_resources or ONE_CPU]

    def _needed(self) -> list[RemoteProcess]:
        return [self._learner, *self._shards]

    def _vital(self) -> list[RemoteProcess]:
        return self._needed()

    def _start_processes(self) -> None:
        topology = self._topology
        resources = dict(topology.learner_resources) or default_resources(topology.mesh.num_devices)
        actor_resources = dict(topology.actor_resources) or ONE_CPU
        variables = {} if resources.get("GPU") else {"JAX_PLATFORMS": "cpu"}
        labels = topology.learner_node_labels
        self._start_process(LEARNER, RemoteLearner, (self._config,), resources, variables, labels)
        for i, shard in enumerate(self.machine.replay.shards):
            arguments, labels = (self._config, i), topology.replay_node_labels
            self._start_process(shard, RemoteReplayShard, arguments, actor_resources, IN_LINE, labels)
        for i, actor in enumerate(self.machine.actors.each):
            arguments, labels = (self._config, i), topology.actor_node_labels
            self._start_process(actor.process, RemoteActor, arguments, actor_resources, IN_LINE, labels)
        self._tell(Started())
