"""Makes the parts of a run (environment, network, topology), and computes what they take up on which devices."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qfleet.config import (
    ActorLearnerConfig,
    AllReduceConfig,
    ConfigError,
    FusedConfig,
    GossipConfig,
    OverlappedConfig,
    ParameterServerConfig,
    TrainConfig,
)
from qfleet.config.own_parts import check_parts_can_travel, own_parts
from qfleet.config.topology import EnvironmentKind
from qfleet.core.masks import masked
from qfleet.core.types import Network
from qfleet.envs.first_step import check_works
from qfleet.envs.host import HostEnv
from qfleet.envs.registry import check_can_travel, make_env
from qfleet.envs.spec import InGraphEnv
from qfleet.networks import check_network, check_own_parts, make_network
from qfleet.runtime.devices import limit_cpu_threads, set_cpu_devices, split_cpu, use_cpu_only
from qfleet.topologies.base import OwnLearner, Topology
from qfleet.topologies.footprint import Footprint, check_fits

if TYPE_CHECKING:
    import optax


class RunParts(NamedTuple):
    """The parts of one run."""

    env: InGraphEnv | HostEnv
    network: Network
    topology: Topology


def make_parts(
    config: TrainConfig, network: Network | None, optimiser: "optax.GradientTransformation | None"
) -> RunParts:
    """Makes environment, network and topology, after dividing the CPU into the devices that the run wants.

    Raises:
      ConfigError: if they can't be made, or don't suit each other.
    """
    env, network = make_env_and_network(config, network)
    return RunParts(env, network, make_topology(config, env, network, optimiser))


def make_parts_of_trials(configs: Sequence[TrainConfig]) -> list[RunParts]:
    """Makes the parts of several runs that one program trains. The runs must be iterated over in turn.

    Args:
      configs: their configs, with equal `program_key`.

    Raises:
      ConfigError: if one program can't train them, such as for lack of memory.
    """
    from qfleet.topologies.fused.trials import FusedTrial, FusedTrials

    configs = [config.with_schedule_lengths() for config in configs]
    whole = dataclasses.replace(configs[0], seed=0, num_seeds=len(configs) * configs[0].num_seeds)
    env, network = make_env_and_network(whole, None)
    if not isinstance(env, InGraphEnv) or (env.spec.time_limit is None and whole.eval_max_episode_steps is None):
        raise ConfigError(
            f"trials in one program need an environment that is written in JAX, with a time limit or "
            f"eval_max_episode_steps, because they are evaluated together, got {whole.env}"
        )
    together = FusedTrials(whole, configs, env, network)
    check_fits(whole, together.footprint(), footprint)
    return [RunParts(env, network, FusedTrial(together, i)) for i in range(len(configs))]


def footprint(
    config: TrainConfig, *, network: Network | None = None, optimiser: "optax.GradientTransformation | None" = None
) -> Footprint:
    """Returns what a run of `config` would keep on which devices; nothing is allocated or compiled.

    If each seed is trained in a process of its own, it is what one of them would keep.

    Args: as for `qfleet.train`.
    """
    if config.has_seed_processes:
        config = config.of_seed(config.seed)
    if config.topology.runs_in == "joined processes":
        set_cpu_devices(config.topology.mesh.num_devices)  # as if this process had all processes' devices
    env, network = _describe_env_and_network(config, network, computes=False)
    return make_topology(config, env, network, optimiser).footprint()


def make_env_and_network(config: TrainConfig, network: Network | None) -> tuple[InGraphEnv | HostEnv, Network]:
    """Divides the CPU into the devices that the run wants, which must precede any use of JAX, and returns both.

    Raises:
      ConfigError: if there is no such environment, it fails in its first step, or the network doesn't suit it.
    """
    env, network = _describe_env_and_network(config, network, computes=True)
    if isinstance(env, HostEnv):
        check_works(env, config.topology.lane_options)
    return env, network


def _describe_env_and_network(
    config: TrainConfig, network: Network | None, *, computes: bool
) -> tuple[InGraphEnv | HostEnv, Network]:
    """Returns both as `make_env_and_network` does, but takes no step in the environment.

    Unless it `computes`, it only traces a user's own parts.
    """
    topology = config.topology
    if topology.runs_in == "ray":
        use_cpu_only()  # this process only directs the others, and one of them may need the whole GPU
    if config.num_seeds > 1:
        split_cpu(config.num_seeds)
    elif topology.cpu_devices > 1:
        set_cpu_devices(topology.cpu_devices)
    env = make_env(config.env, **config.env_options)
    check_own_parts(env.spec, config.agent, network, computes=computes)
    network = make_network(env.spec, config.agent, network)
    limit_cpu_threads(check_network(network, env.spec, config.agent))
    return env, masked(network, env.spec)


def make_topology(
    config: TrainConfig, env: InGraphEnv | HostEnv, network: Network, optimiser: "optax.GradientTransformation | None"
) -> Topology:
    """Returns the topology that the run takes place in; nothing is compiled yet.

    Raises:
      ConfigError: if the topology doesn't suit the environment.
    """
    if _kind_of(env) not in config.topology.environment_kinds:
        is_in_graph = isinstance(env, InGraphEnv)
        raise ConfigError(
            f"a topology must suit the environment, got {config.topology.name} for {config.env}, which is "
            f"{'' if is_in_graph else 'not '}written in JAX; give --topology {'fused' if is_in_graph else 'overlapped'}"
        )
    return _MAKERS[config.topology.name](config.with_schedule_lengths(), env, network, optimiser)


def make_own_learner(config: TrainConfig) -> OwnLearner:
    """Returns the topology of a process that learns on its own; a gossip run calls this in each of its peers."""
    env, network = _describe_env_and_network(config, None, computes=False)
    topology = make_topology(config, env, network, None)
    assert isinstance(topology, OwnLearner)
    return topology


def check_is_built_in(config: TrainConfig, network: Network | None, optimiser: Any) -> None:
    """Raises ConfigError if processes of the run must build what only this process has.

    That is a network or an optimiser that is given, or an environment that this program registers. Also if both a
    network is given and the config names one.
    """
    if network is not None and config.agent.network is not None:
        raise ConfigError(
            f"a run must have one network, got one as an argument beside network {config.agent.network} in the config; "
            f"leave one of the two out"
        )
    if not (config.topology.builds_own_network or config.has_seed_processes):
        return
    check_can_travel(config.env)
    check_parts_can_travel(own_parts(config.agent))
    given = " and ".join(name for name, value in (("network", network), ("optimiser", optimiser)) if value is not None)
    if given:
        where, remedy = f"topology {config.topology.name}", "train with topology fused or overlapped"
        if config.has_seed_processes:
            where += f" and num_seeds={config.num_seeds}"
            remedy = "train one seed after the other, with num_seeds=1"
            remedy += ", and with topology fused or overlapped" * config.topology.builds_own_network
        raise ConfigError(
            f"a run in several processes builds its network and optimiser from the config, because functions cannot be "
            f"sent to them, got {given} with {where}; {remedy}"
        )


def _kind_of(env: InGraphEnv | HostEnv) -> EnvironmentKind:
    return "in-graph" if isinstance(env, InGraphEnv) else "host"


# Each topology is imported only where it is made, because a run needs one of them.


def _make_fused(config: TrainConfig, env: Any, network: Network, optimiser: Any) -> Topology:
    from qfleet.topologies.fused.topology import Fused

    return Fused(config, env, network, optimiser)


def _make_overlapped(config: TrainConfig, env: Any, network: Network, optimiser: Any) -> Topology:
    from qfleet.topologies.overlapped.topology import Overlapped

    return Overlapped(config, env, network, optimiser)


def _make_all_reduce(config: TrainConfig, env: Any, network: Network, optimiser: Any) -> Topology:
    """Returns the topology that each of the equal processes runs: fused or overlapped, on the mesh of all of them."""
    topology = config.topology_as(AllReduceConfig).in_one_process(_kind_of(env))
    return make_topology(dataclasses.replace(config, topology=topology), env, network, optimiser)


def _make_gossip(config: TrainConfig, env: Any, network: Network, optimiser: Any) -> Topology:
    from qfleet.topologies.gossip.topology import Gossip

    return Gossip(config, env, network, make_own_learner)


def _make_actor_learner(config: TrainConfig, env: Any, network: Network, optimiser: Any) -> Topology:
    from qfleet.topologies.actor_learner.topology import ActorLearner

    return ActorLearner(config, env, network)


def _make_parameter_server(config: TrainConfig, env: Any, network: Network, optimiser: Any) -> Topology:
    from qfleet.topologies.parameter_server.topology import ParameterServer

    return ParameterServer(config, env, network)


_MAKERS: dict[str, Callable[[TrainConfig, Any, Network, Any], Topology]] = {
    FusedConfig.name: _make_fused,
    OverlappedConfig.name: _make_overlapped,
    AllReduceConfig.name: _make_all_reduce,
    GossipConfig.name: _make_gossip,
    ActorLearnerConfig.name: _make_actor_learner,
    ParameterServerConfig.name: _make_parameter_server,
}
"""Functions that make topologies, by name. Topologies of several processes build networks and optimisers themselves."""
