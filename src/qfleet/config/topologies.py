"""One config per topology, and `TOPOLOGIES`, which lists them by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from qfleet.config.agent import AgentConfig
from qfleet.config.checks import (
    MAX_PROCESSES,
    MAX_SIZE,
    check,
    check_count,
    check_counts,
    check_ray_address,
    check_silence,
    is_host_and_port,
)
from qfleet.config.errors import ConfigError, suggest
from qfleet.config.lane_options import LaneOptions
from qfleet.config.node_labels import check_node_labels
from qfleet.config.ray_topologies import ActorLearnerConfig, GossipConfig, ParameterServerConfig
from qfleet.config.topology import Division, EnvironmentKind, MeshConfig, TopologyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedConfig(TopologyConfig):
    """Where it runs: in one compiled program, which acts and learns."""

    name: ClassVar[str] = "fused"
    summary: ClassVar[str] = "acting and learning in one compiled program, for environments written in JAX"
    environment_kinds: ClassVar[tuple[EnvironmentKind, ...]] = ("in-graph",)
    replays_with_memory: ClassVar[tuple[str, ...]] = ("uniform", "prioritised", "none")

    num_envs: int = 32
    """Lanes: environments stepped at once, over all devices."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices that share the work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_envs", self.num_envs, maximum=MAX_SIZE)

    def is_repeatable(self, agent: AgentConfig) -> bool:
        """Returns True, because there is one program."""
        return True

    def describe_lanes(self, backend: str) -> str:
        """Returns "in-graph", because the environments are part of the program."""
        return "in-graph"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlappedConfig(LaneOptions, TopologyConfig):
    """Where it runs: threads or processes step environments of other libraries while the learner learns."""

    name: ClassVar[str] = "overlapped"
    summary: ClassVar[str] = "other environments step in threads or processes while the learner learns"
    environment_kinds: ClassVar[tuple[EnvironmentKind, ...]] = ("host",)
    replays_with_memory: ClassVar[tuple[str, ...]] = ("uniform", "prioritised", "none")

    lock_step: bool = False
    """Wait for each row's learning before the next action. This is slower, and deterministic if the environments are.
    Without replay, acting and learning always run in lock step."""
    num_envs: int = 8
    """Lanes: environments stepped at once, over all devices."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices that share the work."""
    profile: bool = False
    """Measure where the time goes: environment, transfer, inference, replay, update.
    To time the parts, the run waits for each of them before it starts the next, which makes it slower.
    What is learned is the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_envs", self.num_envs, maximum=MAX_SIZE)
        fits = self.num_env_workers <= self.num_envs
        check(fits, "num_env_workers", f"at most num_envs={self.num_envs}", self.num_env_workers)
        check(
            not self.profile or self.mesh.num_devices == 1,
            "mesh.data x mesh.model", "1 with profile, which times one device", self.mesh.num_devices,
        )  # fmt: skip

    def is_repeatable(self, agent: AgentConfig) -> bool:
        """Returns whether the environments and the learner wait for each other."""
        return self.lock_step or self.profile or agent.replay == "none"

    def describe_lanes(self, backend: str) -> str:
        """Returns the number of lanes, and what steps them."""
        num_workers = min(self.num_env_workers, self.num_envs)
        if num_workers:
            where = f"in {num_workers} worker process{'es' if num_workers > 1 else ''}"
        elif backend in ("ale", "envpool"):
            where = "on its own threads"
        elif backend == "gymnasium":
            where = "in this process"
        else:
            where = "at once"  # the function that made the lanes decides how
        return f"{self.num_envs} {where}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllReduceConfig(LaneOptions, TopologyConfig):
    """Where it runs: in equal processes that take each learner step together, without a server.

    Each process has its share of the lanes and of the replay. It runs the fused or the overlapped topology, whichever
    suits the environment, on a mesh over the devices of all processes. Gradients are averaged at every learner step,
    so all processes wait for the slowest.
    """

    name: ClassVar[str] = "all-reduce"
    summary: ClassVar[str] = "equal processes in step, whose gradients are averaged at every learner step"
    runs_in: ClassVar[Any] = "joined processes"
    replays_with_memory: ClassVar[tuple[str, ...]] = ("none",)

    lock_step: bool = False
    """Wait for each row's learning before the next action, as in the overlapped topology."""
    num_envs: int = 32
    """Lanes: environments stepped at once, over all processes."""
    num_processes: int = 2
    """Number of equal processes, over all hosts."""
    devices_per_process: int = 1
    """Devices of each process. A CPU is divided into that many devices."""
    coordinator: str | None = None
    """HOST:PORT of the first process, to start each process by hand; None starts all processes on this host.
    Several hosts must share the run's folder."""
    process_id: int | None = None
    """Number of the process to start here, from 0, with `coordinator`."""
    ray_address: str | None = None
    """Address of a Ray cluster that places the processes, one per host or GPU: `auto` or HOST:PORT.
    With `local`, a cluster is started on this machine and ends with the run. None does without Ray."""
    process_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes on which Ray places the processes, as given to `ray start --labels`.
    Each is VALUE, !VALUE (any other, or none), in(VALUE,VALUE) or !in(VALUE,VALUE). They need Ray 2.50 or newer."""
    silence_seconds: float = 60.0
    """Longest time that a process may be silent. One that is silent for longer counts as lost, like one that died.
    Then all processes stop, and start again from the newest checkpoint."""
    max_restarts: int = 3
    """Number of times that all processes may start again before the run fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_envs", self.num_envs, maximum=MAX_SIZE)
        check_counts(self, "num_processes", "devices_per_process", maximum=MAX_PROCESSES)
        check_count("max_restarts", self.max_restarts, minimum=0)
        check_silence(self.silence_seconds)
        each = self.num_envs // self.num_processes
        fits = self.num_env_workers <= each
        check(fits, "num_env_workers", f"at most num_envs / num_processes={each}", self.num_env_workers)
        self._check_start()

    def _check_start(self) -> None:
        by_hand = self.coordinator is not None
        check(
            by_hand == (self.process_id is not None),
            "coordinator and process_id", "given together, or both left out to start all processes here",
            (self.coordinator, self.process_id),
        )  # fmt: skip
        if self.ray_address is not None:
            rule = "given without coordinator and process_id, because Ray places all processes"
            check(not by_hand, "ray_address", rule, (self.ray_address, self.coordinator, self.process_id))
            check_ray_address(self.ray_address)
        check_node_labels(self)
        if self.coordinator is not None and self.process_id is not None:
            check(is_host_and_port(self.coordinator), "coordinator", "HOST:PORT", self.coordinator)
            known = f"0 to num_processes - 1 = {self.num_processes - 1}"
            check(0 <= self.process_id < self.num_processes, "process_id", known, self.process_id)

    @property
    def mesh(self) -> MeshConfig:
        """The devices of all processes."""
        return MeshConfig(data=self.num_processes * self.devices_per_process)

    @property
    def cpu_devices(self) -> int:
        """One, because the launcher takes no part in learning, and each process divides its own CPU."""
        return 1

    @property
    def num_busy_processes(self) -> int:
        """The devices of all processes, and their environment workers."""
        return self.num_processes * (self.devices_per_process + self.num_env_workers)

    @property
    def is_started_by_hand(self) -> bool:
        """Whether the user starts each process, with `coordinator`."""
        return self.coordinator is not None

    @property
    def lane_division(self) -> Division:
        """Lanes and batches divide over the devices of all processes."""
        return Division("num_processes x devices_per_process", self.mesh.data)

    def in_one_process(self, kind: EnvironmentKind) -> FusedConfig | OverlappedConfig:
        """Returns the topology that each process runs, on the mesh over the devices of all processes."""
        if kind == "in-graph":
            return FusedConfig(num_envs=self.num_envs, mesh=self.mesh)
        options = dataclasses.asdict(self.lane_options)
        return OverlappedConfig(num_envs=self.num_envs, mesh=self.mesh, lock_step=self.lock_step, **options)

    def describe_lanes(self, backend: str) -> str:
        """Returns the number of lanes and of processes."""
        return f"{self.num_envs} over {self.num_processes} processes"

    def with_processes(self, settings: Mapping[str, Any]) -> TopologyConfig:
        """Returns the config with other processes, or with another way to start them.

        Args:
          settings: as for `TopologyConfig.with_processes`. Coordinator `local` starts all processes on this machine.

        Raises:
          ConfigError: if the sizes don't divide over that many processes, or the settings contradict each other.
        """
        changes = dict(settings)
        if settings.get("coordinator") == "local":
            if "process_id" in settings or "ray_address" in settings:
                raise ConfigError(
                    f"coordinator local starts all processes on this machine, so it must come without process_id and "
                    f"ray_address, got {settings.get('process_id')} and {settings.get('ray_address')}; leave them out, "
                    f"or give HOST:PORT"
                )
            changes |= {"coordinator": None, "process_id": None, "ray_address": None, "process_node_labels": {}}
        elif "coordinator" in settings or "process_id" in settings:
            changes = {"ray_address": None, "process_node_labels": {}} | changes
        elif "ray_address" in settings:
            changes |= {"coordinator": None, "process_id": None}
        return super().with_processes(changes)


TOPOLOGIES: dict[str, type[TopologyConfig]] = {
    kind.name: kind
    for kind in (
        FusedConfig,
        OverlappedConfig,
        AllReduceConfig,
        GossipConfig,
        ActorLearnerConfig,
        ParameterServerConfig,
    )
}
"""Config classes of all topologies, by name."""

RENAMED = {
    "num_workers": "num_env_workers",
    "peer_timeout_seconds": "silence_seconds",
    "ladder_base": "actor_epsilon_base",
    "ladder_exponent": "actor_epsilon_exponent",
}
"""Current names of renamed settings, by their earlier name. Only the parameter server still has `num_workers`."""


def check_topology_name(name: str) -> None:
    """Raises ConfigError if there is no topology of that name."""
    if name not in TOPOLOGIES:
        raise ConfigError(f"topology must be one of {', '.join(TOPOLOGIES)}, got {name!r}.{suggest(name, TOPOLOGIES)}")


def without_alias(topology: str | None, exchange: str | None) -> str | None:
    """Returns the name of a topology, with the earlier name "decentralised" and its `exchange` replaced.

    Raises:
      ConfigError: if an exchange is given with another topology, or is unknown.
    """
    if topology != "decentralised":
        if exchange is not None:
            raise ConfigError(
                f"exchange must come with topology decentralised, got {topology}; leave it out, or choose topology "
                f"all-reduce or gossip"
            )
        return topology
    exchange = "all-reduce" if exchange is None else exchange
    if exchange not in ("all-reduce", "gossip"):
        raise ConfigError(f"exchange must be all-reduce or gossip, got {exchange!r}")
    return exchange


def check_suits(setting: str, topology: str) -> None:
    """Checks that a setting belongs to no other topology, and has an effect with this one.

    Raises:
      ConfigError: if it belongs to another topology, or has no effect.
    """
    if reason := TOPOLOGIES[topology].settings_without_effect.get(setting):
        raise ConfigError(f"{setting} must come with {reason}")
    own = field_names(TOPOLOGIES[topology])
    if setting not in own and RENAMED.get(setting) in own:
        raise ConfigError(
            f"{setting} must be given by its new name with topology {topology}, got the earlier one; give "
            f"{RENAMED[setting]}"
        )
    homes = _homes(setting) or _homes(RENAMED.get(setting, ""))
    if not homes or topology in homes:
        return
    remedy = f"leave it out, or choose topology {' or '.join(homes)}"
    if setting == "profile":
        remedy = (
            "the host can't time the parts of one compiled program, so measure them with jax.profiler.trace or "
            "benchmarks/limit.py, or train in an environment outside the program, such as gym:CartPole-v1"
        )
    raise ConfigError(f"{setting} must come with topology {' or '.join(homes)}, got topology {topology}; {remedy}")


def suits(setting: str, topology: str) -> bool:
    """Returns whether a setting belongs to this topology, or to none."""
    return topology in (_homes(setting) or [topology])


def _homes(setting: str) -> list[str]:
    """Returns the names of the topologies that have a setting."""
    return [name for name, kind in TOPOLOGIES.items() if setting in field_names(kind)]


def field_names(kind: Any) -> set[str]:
    """Returns the names of a config's fields."""
    return {field.name for field in dataclasses.fields(kind)}
