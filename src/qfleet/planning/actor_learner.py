"""What the simulation knows of actor-learner: what each request reads, costs and replies."""

from collections.abc import Sequence
from typing import Any

from qfleet.config import ActorLearnerConfig, TrainConfig
from qfleet.planning.costs import NOTHING, Cost, Costs
from qfleet.planning.fleet import FleetModel
from qfleet.planning.replay import NO_EPISODES, SimulatedReplay
from qfleet.topologies.actor_learner.learner import UpdateResult
from qfleet.topologies.actor_learner.machine import (
    LEARNER,
    ActorLearnerMachine,
    ActorLearnerStats,
    Collect,
    Learn,
    Publish,
    RestoreLearner,
)
from qfleet.topologies.fleet.messages import Begin, CallRequest, ProcessId
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.sharded_replay import Insert, SampleShare, SetPriorities


class ActorLearnerModel(FleetModel[ActorLearnerMachine]):
    """The actors, the shards of the replay and the learner."""

    def __init__(self, config: TrainConfig, costs: Costs, num_batches: int) -> None:
        """Begins with new processes; `num_batches` is the number of batches of one round."""
        super().__init__(costs)
        topology = config.topology_as(ActorLearnerConfig)
        self.machine = ActorLearnerMachine(config, num_batches)
        self.machine.stats = ActorLearnerStats(topology.num_actors)
        self._num_batches = num_batches
        self._replay = SimulatedReplay(config, topology.actor_pool)
        self._versions: dict[ProcessId, int] = {}
        self._learner_steps = 0

    @property
    def processes(self) -> Sequence[ProcessId]:
        """The learner, the shards and the actors."""
        machine = self.machine
        return [LEARNER, *machine.replay.shards, *(actor.process for actor in machine.actors.each)]

    def cost(self, request: CallRequest[Any]) -> Cost:
        """Returns what a request costs."""
        match request:
            case Collect(process, broadcast):
                is_new = self._versions.get(process) != broadcast.version
                self._versions[process] = broadcast.version
                return self.cost_of("collect, new parameters" if is_new else "collect")
            case Insert():
                return self.cost_of("insert")
            case SampleShare():
                return self.cost_of("sample_share")
            case Learn():
                return self.cost_of("learn")
            case SetPriorities():
                return self.cost_of("set_priorities")
            case Publish():
                return self.cost_of("publish")
        return NOTHING

    def arguments(self, request: CallRequest[Any]) -> Sequence[Reference[Any]]:
        """Returns the references that a request reads."""
        match request:
            case Collect(broadcast=broadcast):
                return [broadcast.params]
            case Insert(arrived=arrived):
                return [arrived.chunk]
            case Learn(drawn=drawn):
                return drawn.transitions
            case SetPriorities(priority=priority):
                return [priority]
        return ()

    def reply(self, request: CallRequest[Any]) -> Any:
        """Returns the reply to a request."""
        match request:
            case Collect():
                return NO_EPISODES, request.results[0]
            case Learn():
                self._learner_steps += self._num_batches
                return UpdateResult(0.0, 0.0, self._learner_steps, 0.0), request.results
            case Publish():
                return self._learner_steps, request.results[0]
            case RestoreLearner(learner_steps=learner_steps):
                self._learner_steps = learner_steps
                return None
            case Begin():
                return None
        return self._replay.reply(request)

    def lose(self, process: ProcessId) -> None:
        """Forgets what a process held. A learner goes on from where it was, as after a new checkpoint."""
        self._versions.pop(process, None)
        if process.role == "replay shard":
            self._replay.lose(process)
