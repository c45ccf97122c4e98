"""What the simulation knows of the parameter server: what each request reads, costs and replies."""

from collections.abc import Sequence
from typing import Any

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.planning.costs import NOTHING, Cost, Costs
from qfleet.planning.fleet import FleetModel
from qfleet.planning.replay import NO_EPISODES, SimulatedReplay
from qfleet.topologies.fleet.messages import CallRequest, ProcessId
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.sharded_replay import Insert, RestoreReplay, SampleShare, SetPriorities
from qfleet.topologies.parameter_server.machine import ServerMachine
from qfleet.topologies.parameter_server.requests import (
    Act,
    ActAnswer,
    ApplyAverages,
    ApplyGradients,
    AverageGradients,
    ComputeGradient,
    ComputeGradientOf,
    GradientAnswer,
    Publish,
    PublishedAnswer,
    Pull,
    TakeSnapshot,
)
from qfleet.topologies.parameter_server.stats import ServerStats
from qfleet.topologies.parameter_server.worker import GradientStats

_RESULT = GradientStats(0.0, 0.0, 0.0, 0.0)


class ParameterServerModel(FleetModel[ServerMachine]):
    """The workers, the shards of the server, and those of the replay if the workers share one."""

    def __init__(self, config: TrainConfig, costs: Costs) -> None:
        """Begins with new processes."""
        super().__init__(costs)
        topology = config.topology_as(ParameterServerConfig)
        self.machine = ServerMachine(config, num_params=0)
        self.machine.stats = ServerStats(topology.num_workers)
        self._num_pieces = topology.num_server_shards
        self._replay = SimulatedReplay(config, topology.actor_pool)

    @property
    def processes(self) -> Sequence[ProcessId]:
        """The shards of the server, those of a shared replay, and the workers."""
        machine = self.machine
        shards = machine.replay.shards if machine.shares_replay else []
        return [*machine.server.shards, *shards, *(worker.process for worker in machine.actors.each)]

    def cost(self, request: CallRequest[Any]) -> Cost:
        """Returns what a request costs."""
        match request:
            case Act(pull=pull):
                return self.cost_of("act" + _more(pull))
            case ComputeGradient(pull=pull) | ComputeGradientOf(pull=pull):
                return self.cost_of("compute_gradient" + _more(pull))
            case ApplyGradients(gradients=gradients):
                num_steps = max(1, len(gradients) // self._gradients_per_step)
                return self.cost_of("apply").times(num_steps)
            case ApplyAverages():
                return self.cost_of("apply")
            case AverageGradients():
                return self.cost_of("average_gradients")
            case Insert():
                return self.cost_of("insert")
            case SampleShare():
                return self.cost_of("sample_share")
            case SetPriorities():
                return self.cost_of("set_priorities")
        return NOTHING

    @property
    def _gradients_per_step(self) -> int:
        return self.machine.config.topology_as(ParameterServerConfig).gradients_per_learner_step

    def arguments(self, request: CallRequest[Any]) -> Sequence[Reference[Any]]:
        """Returns the references that a request reads."""
        match request:
            case Act(pull=pull) | ComputeGradient(pull=pull):
                return [*pull.params, *pull.target_params]
            case ComputeGradientOf(pull=pull, drawn=drawn):
                return [*pull.params, *pull.target_params, *drawn.transitions]
            case ApplyGradients(gradients=gradients) | AverageGradients(gradients=gradients):
                return gradients
            case ApplyAverages(squared_norms=squared_norms):
                return squared_norms
            case Insert(arrived=arrived):
                return [arrived.chunk]
            case SetPriorities(priority=priority):
                return [priority]
        return ()

    def reply(self, request: CallRequest[Any]) -> Any:
        """Returns the reply to a request."""
        results, number = request.results, request.process.number
        match request:
            case Act():
                if results:
                    return ActAnswer(NO_EPISODES, None, results[0])
                return ActAnswer(NO_EPISODES, self._replay.store(number), None)
            case ComputeGradient() | ComputeGradientOf():
                return GradientAnswer(_RESULT, tuple(results[: self._num_pieces]), tuple(results[self._num_pieces :]))
            case ApplyGradients() | ApplyAverages():
                return PublishedAnswer(0.0, results[0], results[1] if len(results) > 1 else None)
            case AverageGradients():
                return 0.0, results[0]
            case Publish():
                return tuple(results)
            case TakeSnapshot():
                return results[0]
            case Insert() | SampleShare() | SetPriorities() | RestoreReplay():
                return self._replay.reply(request)
        return None

    def lose(self, process: ProcessId) -> None:
        """Forgets what a process held."""
        if process.role != "server shard":
            self._replay.lose(process)


def _more(pull: Pull) -> str:
    return ", new parameters" if pull.params else ""
