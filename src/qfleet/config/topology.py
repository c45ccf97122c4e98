"""What every topology's config says about itself, so that the rest of the code need not ask which topology it is."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from qfleet.config.agent import AgentConfig
from qfleet.config.checks import MAX_PROCESSES, check, check_count
from qfleet.config.errors import ConfigError
from qfleet.config.lane_options import LaneOptions
from qfleet.config.values import Config

EnvironmentKind = Literal["in-graph", "host"]
"""in-graph: written in JAX, as part of the compiled program. host: from another library, outside the program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """The devices of a run, arranged as `data` times `model`. The same program runs on a mesh of any size."""

    data: int = 1
    """Devices over which lanes, replay and each batch are divided; gradients are averaged over them."""
    model: int = 1
    """Devices over which the network, its target and the optimiser's moments are divided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "model"):
            check_count(f"mesh.{name}", getattr(self, name), maximum=MAX_PROCESSES)

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return self.data * self.model


class Division(NamedTuple):
    """A number of equal shares that something must divide over, and the name that users know it by."""

    name: str
    num_shares: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopologyConfig(Config):
    """Where a run takes place. Each topology has a subclass, which tells the rest of qfleet what it must know of it."""

    name: ClassVar[str]
    """Name of the topology, as in `--topology NAME`."""
    summary: ClassVar[str]
    """One sentence about the topology, for the help of the command line."""
    environment_kinds: ClassVar[tuple[EnvironmentKind, ...]] = ("in-graph", "host")
    """Kinds of environments that the topology can train in."""
    runs_in: ClassVar[Literal["this process", "joined processes", "ray"]] = "this process"
    """Where the work is done. With "joined processes", a launcher starts equal processes, each of which trains the run.
    With "ray", this process directs others on a Ray cluster, and plays the episodes of evaluations."""
    replays_with_memory: ClassVar[tuple[str, ...]] = ()
    """Kinds of replay with which the topology can train an agent that has a memory."""
    settings_without_effect: ClassVar[Mapping[str, str]] = {}
    """Fields of `AgentConfig` that have no effect with this topology, each with the reason and the remedy."""

    if TYPE_CHECKING:  # fields of some topologies and properties of others

        @property
        def num_envs(self) -> int:
            """Lanes: environments stepped at once, over all devices and processes."""

        @property
        def mesh(self) -> MeshConfig:
            """Devices that one learner is spread over."""

    @property
    def builds_own_network(self) -> bool:
        """Whether each process builds network and optimiser from the config, because functions cannot be sent to it."""
        return self.runs_in != "this process"

    @property
    def cpu_devices(self) -> int:
        """Number of devices that the process which starts the run must divide its CPU into."""
        return self.mesh.num_devices

    @property
    def lane_options(self) -> LaneOptions:
        """How environments outside the compiled program are stepped; the defaults where there are none."""
        return LaneOptions()

    @property
    def num_busy_processes(self) -> int:
        """Number of processes, and devices of a process, that one run keeps busy at the same time."""
        return self.mesh.num_devices + self.lane_options.num_env_workers

    @property
    def is_started_by_hand(self) -> bool:
        """Whether the user starts each process of the run, so that nothing else can."""
        return False

    @property
    def lane_division(self) -> Division:
        """What the lanes divide over."""
        return Division("mesh.data", self.mesh.data)

    @property
    def batch_division(self) -> Division:
        """What each batch divides over."""
        return self.lane_division

    def is_repeatable(self, agent: AgentConfig) -> bool:
        """Returns whether the same seed gives the same result on one kind of device, if the environments do too."""
        return False

    def check_agent(self, agent: AgentConfig) -> None:
        """Checks that this topology can train the agent.

        Raises:
          ConfigError: if it cannot.
        """

    def describe_lanes(self, backend: str) -> str:
        """Returns the number of lanes and what steps them, such as "8 over 2 processes", for a run's first line."""
        raise NotImplementedError

    def with_processes(self, settings: Mapping[str, Any]) -> "TopologyConfig":
        """Returns the config with other processes, or with the same ones started in another way.

        Args:
          settings: values of some of `num_processes`, `coordinator`, `process_id` and `ray_address`; None isn't one.

        Raises:
          ConfigError: if the topology has no such setting.
        """
        names = {field.name for field in dataclasses.fields(self)}
        if unknown := [name for name in settings if name not in names]:
            homes = "all-reduce" if {"coordinator", "process_id"} & set(unknown) else "all-reduce or gossip"
            raise ConfigError(
                f"{' and '.join(unknown)} must come with topology {homes}, got {self.name}; leave "
                f"{'it' if len(unknown) == 1 else 'them'} out"
            )
        return dataclasses.replace(self, **settings)


def check_learns_while_others_act(name: str, agent: AgentConfig) -> None:
    """Checks that an agent has a replay, which a topology needs that learns while others act."""
    rule = f"uniform or prioritised with topology {name}, which learns while others act"
    check(agent.replay != "none", "replay", rule, agent.replay)
