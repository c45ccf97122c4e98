"""What a run is made of: environment, network and topology, and what they take up on which devices."""

from typing import TYPE_CHECKING

from qfleet.config import (
    ActorLearnerConfig,
    ConfigError,
    DecentralisedConfig,
    ParameterServerConfig,
    TrainConfig,
    is_launched,
    topology_name,
)
from qfleet.core.types import Network
from qfleet.envs.host import HostEnv
from qfleet.envs.registry import make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.networks import check_network, make_network
from qfleet.runtime.devices import limit_cpu_threads, set_cpu_devices, split_cpu, use_cpu_only
from qfleet.topologies.actor_learner.topology import ActorLearner
from qfleet.topologies.base import OwnLearner, Topology
from qfleet.topologies.footprint import Footprint
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.gossip.topology import Gossip
from qfleet.topologies.overlapped.topology import Overlapped
from qfleet.topologies.parameter_server.topology import ParameterServer

if TYPE_CHECKING:
    import optax


def footprint(
    config: TrainConfig, *, network: Network | None = None, optimiser: "optax.GradientTransformation | None" = None
) -> Footprint:
    """Returns what a run of `config` would keep on which devices; nothing is allocated or compiled.

    Args: as for `qfleet.train`.
    """
    if is_launched(config.topology):
        set_cpu_devices(config.topology.mesh.num_devices)  # for all processes, which this one isn't
    env, network = make_env_and_network(config, network)
    return make_topology(config, env, network, optimiser).footprint()


def make_env_and_network(config: TrainConfig, network: Network | None) -> tuple[InGraphEnv | HostEnv, Network]:
    """Returns both, once the CPU is divided into the devices that the run wants: that is for before JAX is used."""
    topology, mesh = config.topology, config.topology.mesh
    if isinstance(topology, ActorLearnerConfig | ParameterServerConfig):
        use_cpu_only()  # this process only directs the others, of which one may want all of the GPU
    elif isinstance(topology, DecentralisedConfig) and topology.gossips:
        use_cpu_only()  # the same
        set_cpu_devices(topology.devices_per_process)  # to tell from shapes what each of them will keep
    elif config.num_seeds > 1:
        split_cpu(config.num_seeds)
    elif mesh.num_devices > 1 and not is_launched(topology):  # whose processes have theirs
        set_cpu_devices(mesh.num_devices)
    env = make_env(config.env, **config.env_options)
    network = network or make_network(env.spec, config.agent)
    limit_cpu_threads(check_network(network, env.spec))
    return env, network


def make_topology(
    config: TrainConfig, env: InGraphEnv | HostEnv, network: Network, optimiser: "optax.GradientTransformation | None"
) -> Topology:
    """Returns where the run takes place, and how; nothing is compiled.

    Raises:
      ConfigError: if the topology doesn't suit the environment.
    """
    wanted = topology_name(config.topology)
    if wanted == "actor-learner":
        return ActorLearner(config, env, network)
    if wanted == "parameter-server":
        return ParameterServer(config, env, network)
    if isinstance(config.topology, DecentralisedConfig) and config.topology.gossips:
        return Gossip(config, env, network, make_own_learner)
    if isinstance(env, InGraphEnv):
        if wanted in ("fused", "decentralised"):
            return Fused(config, env, network, optimiser)
        kind, fitting = "written in JAX", "fused"
    else:
        if wanted in ("overlapped", "decentralised"):
            return Overlapped(config, env, network, optimiser)
        kind, fitting = "not written in JAX", "overlapped"
    raise ConfigError(
        f"a topology must suit the environment, got {wanted} for {config.env}, which is {kind}; "
        f"give --topology {fitting}"
    )


def make_own_learner(config: TrainConfig) -> OwnLearner:
    """Returns what one process holds that learns on its own, in whatever process this is."""
    env, network = make_env_and_network(config, None)
    topology = make_topology(config, env, network, None)
    assert isinstance(topology, OwnLearner)
    return topology
