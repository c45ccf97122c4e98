"""What the simulation knows of gossip: what each request reads, costs and replies."""

from collections.abc import Sequence
from typing import Any

from qfleet.config import GossipConfig, TrainConfig
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.planning.costs import NOTHING, Cost, Costs
from qfleet.planning.fleet import FleetModel
from qfleet.runtime.records import Sum, make_progress
from qfleet.topologies.fleet.messages import CallRequest, ProcessId
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.gossip.machine import BeginFrom, CopyLearner, GossipMachine, GossipStats, Prepare, TakeChunk
from qfleet.topologies.gossip.peer import PeerChunkStats, peer_config
from qfleet.topologies.gossip.topology import env_steps_per_chunk
from qfleet.topologies.schedule import rows_per_iteration


def own_config(config: TrainConfig) -> TrainConfig:
    """Returns the config of the first peer's own run."""
    env = make_env(config.env, **config.env_options)
    return peer_config(config, 0, is_in_graph=isinstance(env, InGraphEnv))


class GossipModel(FleetModel[GossipMachine]):
    """The peers."""

    def __init__(self, config: TrainConfig, costs: Costs) -> None:
        """Begins with new peers."""
        super().__init__(costs)
        own, topology = own_config(config), config.topology_as(GossipConfig)
        self.env_steps_per_chunk = env_steps_per_chunk(own, topology.gossip_period_learner_steps)
        """Environment steps of one chunk of one peer."""
        self.machine = GossipMachine(config, self.env_steps_per_chunk)
        self.machine.stats = GossipStats(topology.num_processes)
        self.machine.learner = Reference([])
        agent = own.agent
        num_iterations = self.env_steps_per_chunk / (own.topology.num_envs * rows_per_iteration(agent))
        self._learner_steps_per_chunk = (
            num_iterations * agent.num_epochs * agent.num_minibatches
            if agent.replay == "none"
            else self.env_steps_per_chunk / agent.env_steps_per_learner_step
        )
        self._learner_steps = dict.fromkeys(self.processes, 0.0)

    @property
    def processes(self) -> Sequence[ProcessId]:
        """The peers."""
        return [peer.process for peer in self.machine.peers]

    def cost(self, request: CallRequest[Any]) -> Cost:
        """Returns what a request costs."""
        match request:
            case TakeChunk(exchange=None):
                return self.cost_of("chunk")
            case TakeChunk():
                return self.cost_of("chunk after averaging")
        return NOTHING

    def arguments(self, request: CallRequest[Any]) -> Sequence[Reference[Any]]:
        """Returns the references that a request reads."""
        match request:
            case TakeChunk(exchange=exchange) if exchange is not None:
                return [exchange.own.params, exchange.other]
            case BeginFrom(learner=learner, replay=replay):
                return [learner, replay]
        return ()

    def reply(self, request: CallRequest[Any]) -> Any:
        """Returns the reply to a request."""
        match request:
            case TakeChunk(process, env_steps):
                self._learner_steps[process] += self._learner_steps_per_chunk
                learner_steps = int(self._learner_steps[process])
                progress = make_progress(
                    env_steps=env_steps, learner_steps=learner_steps, train_seconds=1.0, new_env_steps=env_steps,
                    new_learner_steps=int(self._learner_steps_per_chunk), episode_return=Sum(), episode_length=Sum(),
                    q_max=Sum(), loss=Sum(), td_error=Sum(), exploration=0.0,
                )  # fmt: skip
                return PeerChunkStats([progress], learner_steps, None, 0), request.results[0]
            case CopyLearner():
                return request.results[0]
            case Prepare() | BeginFrom():
                return None
        raise TypeError(f"the simulation can't answer {request}")

    def lose(self, process: ProcessId) -> None:
        """Forgets nothing: a peer that is replaced goes on as a copy of another one."""
