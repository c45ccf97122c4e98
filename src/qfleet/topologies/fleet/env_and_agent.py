"""Environment, network and agent of a run: built once in each process, and handed to everything that needs them."""

from typing import NamedTuple

from qfleet.config import ActorPool, RayTopologyConfig, TrainConfig
from qfleet.core.agent import Agent, make_agent
from qfleet.core.masks import masked
from qfleet.core.types import EnvSpec, Network, stored_spec
from qfleet.envs.host import HostEnv
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.networks import make_network


class EnvAndAgent(NamedTuple):
    """What an actor, a shard of the replay and a learner all build from the config of a run."""

    env: InGraphEnv | HostEnv
    network: Network
    agent: Agent

    @property
    def stored_spec(self) -> EnvSpec:
        """Spec of the environment, with observations as the network's `to_storage_layout` keeps them."""
        return stored_spec(self.env.spec, self.network.to_storage_layout)


def make_env_and_agent(config: TrainConfig) -> EnvAndAgent:
    """Builds the environment, the network and the agent that a config describes."""
    env = make_env(config.env, **config.env_options)
    network = masked(make_network(env.spec, config.agent), env.spec)
    return EnvAndAgent(env, network, make_agent(network, config.agent, env.spec.frame_stack))


def actor_pool_of(config: TrainConfig) -> ActorPool:
    """Returns the actors and replay shards of a run on Ray."""
    return config.topology_as(RayTopologyConfig).actor_pool
