"""Configs of the topologies whose processes Ray starts and watches: actor-learner, parameter-server and gossip."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from qfleet.config.agent import AgentConfig
from qfleet.config.checks import (
    MAX_PROCESSES,
    MAX_SIZE,
    check,
    check_count,
    check_counts,
    check_positive,
    check_ray_address,
    check_resources,
    check_silence,
)
from qfleet.config.lane_options import LaneOptions
from qfleet.config.node_labels import check_node_labels
from qfleet.config.topology import Division, MeshConfig, TopologyConfig, check_learns_while_others_act

_EPSILON_PER_ACTOR = (
    "a topology whose exploration decays, got topology actor-learner, whose actors have an epsilon each; give "
    "actor_epsilon_base and actor_epsilon_exponent instead"
)


class ActorPool(NamedTuple):
    """Processes that act on their own, and the shards of the replay that keep their transitions."""

    num_actors: int
    lanes_per_actor: int
    rows_per_chunk: int
    """Steps of each lane in one chunk, which an actor takes without interruption."""
    num_shards: int
    sends_td_errors: bool = True
    """Whether the actors compute TD errors of their own, which are the first priorities of what they send."""

    @property
    def num_lanes(self) -> int:
        """Number of lanes of all actors together."""
        return self.num_actors * self.lanes_per_actor

    def actors_of(self, shard: int) -> list[int]:
        """Returns the numbers of the actors whose transitions a shard keeps; shards are numbered from 0."""
        return list(range(shard, self.num_actors, self.num_shards))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayTopologyConfig(TopologyConfig):
    """Where it runs: in processes on Ray, which this process directs."""

    runs_in: ClassVar[Any] = "ray"

    ray_address: str = "local"
    """Address of a Ray cluster: `auto` or HOST:PORT. `local` starts one on this machine, and ends it with the run."""
    silence_seconds: float = 90.0
    """Longest time that a process may take to reply. One that takes longer is replaced, like one that died."""
    max_restarts: int = 5
    """Number of times that one process may be replaced within ten minutes before the run fails."""

    if TYPE_CHECKING:

        @property
        def actor_pool(self) -> ActorPool:
            """The processes that act, and the shards that keep their transitions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ray_address(self.ray_address)
        check_silence(self.silence_seconds)
        check_count("max_restarts", self.max_restarts, minimum=0)
        check_node_labels(self)

    @property
    def cpu_devices(self) -> int:
        """One, because this process only directs the others."""
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorLearnerConfig(LaneOptions, RayTopologyConfig):
    """Where it runs: many actors feed a global replay, and one learner learns from it (Ape-X), on Ray.

    Source: Horgan et al. 2018, arXiv 1803.00933.
    """

    name: ClassVar[str] = "actor-learner"
    replays_with_memory: ClassVar[tuple[str, ...]] = ("uniform", "prioritised")
    summary: ClassVar[str] = "many actors feed a replay, and one learner learns from it, on Ray"
    settings_without_effect: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "exploration_start", "exploration_end", "exploration_schedule", "exploration_env_steps",
            "exploration_fraction",
        ),
        _EPSILON_PER_ACTOR,
    )  # fmt: skip

    num_actors: int = 4
    """Processes that act, each with its own lanes and its own epsilon."""
    lanes_per_actor: int = 4
    """Environments that each actor steps at once."""
    num_replay_shards: int = 1
    """Processes that the replay is divided over; each keeps the transitions of some actors."""
    rows_per_chunk: int = 32
    """Steps of each lane that an actor sends at once, as a chunk.
    Each chunk is requested one chunk ahead, and the actor takes it with the parameters that were newest then."""
    broadcast_period_learner_steps: int = 100
    """Learner steps between the versions of the parameters that the learner publishes for actors."""
    actor_epsilon_base: float = 0.4
    """Epsilon of the first actor; see `actor_epsilon_exponent`. 0 leaves exploration to noisy layers."""
    actor_epsilon_exponent: float = 7.0
    """Actor i of N explores with epsilon `actor_epsilon_base ** (1 + i / (N - 1) * actor_epsilon_exponent)`."""
    initial_priorities: Literal["td_error", "greatest"] = "td_error"
    """Priorities of new transitions: the actor's own TD errors, as in Ape-X, or the greatest priority so far.
    Agents with a memory, or with a head such as C51, always take the greatest: their actors have no TD errors."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The learner's devices."""
    actor_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Ray resources that each actor and each shard of the replay takes. The default is one CPU."""
    learner_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Ray resources that the learner takes.
    The default is one CPU, and one GPU for each device of the learner's mesh if the cluster has that many."""
    actor_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes for the actors, such as `market spot`; see `learner_node_labels`."""
    learner_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the node for the learner, as given to `ray start --labels`. Empty leaves the choice to Ray.
    Each is VALUE, !VALUE (any other, or none), in(VALUE,VALUE) or !in(VALUE,VALUE). They need Ray 2.50 or newer."""
    replay_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes for the shards of the replay; see `learner_node_labels`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_actors", "num_replay_shards", maximum=MAX_PROCESSES)
        check_counts(self, "lanes_per_actor", "rows_per_chunk", maximum=MAX_SIZE)
        check_count("broadcast_period_learner_steps", self.broadcast_period_learner_steps)
        fits = self.num_replay_shards <= self.num_actors
        check(fits, "num_replay_shards", f"at most num_actors={self.num_actors}", self.num_replay_shards)
        fits = self.num_env_workers <= self.lanes_per_actor
        check(fits, "num_env_workers", f"at most lanes_per_actor={self.lanes_per_actor}", self.num_env_workers)
        check(0.0 <= self.actor_epsilon_base <= 1.0, "actor_epsilon_base", "in [0, 1]", self.actor_epsilon_base)
        check(self.actor_epsilon_exponent >= 0, "actor_epsilon_exponent", "at least 0", self.actor_epsilon_exponent)
        check(
            not self.num_env_workers or self.silence_seconds > self.step_timeout_seconds,
            "silence_seconds", f"above step_timeout_seconds={self.step_timeout_seconds:g}, or an actor is replaced "
            f"before its hung environment worker is", self.silence_seconds,
        )  # fmt: skip
        for name in ("actor_resources", "learner_resources"):
            check_resources(name, getattr(self, name))

    @property
    def num_busy_processes(self) -> int:
        """The actors with their environment workers, the shards of the replay, and the learner's devices."""
        return self.num_actors * (1 + self.num_env_workers) + self.num_replay_shards + self.mesh.num_devices

    @property
    def num_envs(self) -> int:
        """Number of lanes of all actors together."""
        return self.num_actors * self.lanes_per_actor

    @property
    def actor_pool(self) -> ActorPool:
        """The actors, and the shards of the replay."""
        sends_td_errors = self.initial_priorities == "td_error"
        return ActorPool(
            self.num_actors, self.lanes_per_actor, self.rows_per_chunk, self.num_replay_shards, sends_td_errors
        )

    @property
    def lane_division(self) -> Division:
        """Each actor has its own lanes, so they need not divide over anything."""
        return Division("", 1)

    @property
    def batch_division(self) -> Division:
        """Each batch divides over the learner's devices."""
        return Division("mesh.data", self.mesh.data)

    def epsilon(self, actor: int) -> float:
        """Returns the probability with which an actor takes a random action; actors are numbered from 0.

        Source: Horgan et al. 2018, arXiv 1803.00933, section 4.1.
        """
        position = actor / (self.num_actors - 1) if self.num_actors > 1 else 0.0
        return float(self.actor_epsilon_base ** (1.0 + position * self.actor_epsilon_exponent))

    def check_agent(self, agent: AgentConfig) -> None:
        """Checks that the agent has a replay, and explores by a number in [0, 1], of which each actor has its own."""
        check_learns_while_others_act(self.name, agent)
        rule = "epsilon_greedy, or one of your own, with topology actor-learner"
        check(agent.exploration != "softmax", "exploration", rule, agent.exploration)
        has_effect = self.initial_priorities == "td_error" or agent.replay == "prioritised"
        rule = "left out with a replay that isn't prioritised"
        check(has_effect, "initial_priorities", rule, self.initial_priorities)

    def describe_lanes(self, backend: str) -> str:
        """Returns the number of lanes and of actors."""
        return f"{self.num_envs} over {self.num_actors} actors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterServerConfig(RayTopologyConfig):
    """Where it runs: workers act and send gradients to a server, which applies them as they come (Gorila), on Ray.

    Source: Nair et al. 2015, arXiv 1507.04296.
    """

    name: ClassVar[str] = "parameter-server"
    summary: ClassVar[str] = "many workers act and send gradients to a server, on Ray"

    num_workers: int = 4
    """Processes that act and compute gradients, each with its own lanes."""
    lanes_per_worker: int = 4
    """Environments that each worker steps at once."""
    num_server_shards: int = 1
    """Processes that the parameters are divided over, in equal parts."""
    num_replay_shards: int = 0
    """Processes that keep the transitions of all workers, so that all workers learn from them.
    With 0, each worker keeps its own transitions, and learns only from those."""
    rows_per_chunk: int = 16
    """Steps of each lane that a worker takes at once."""
    max_staleness: int = 16
    """Learner steps that the server may have taken since the parameters of a gradient; older gradients are dropped."""
    gradients_per_learner_step: int = 1
    """Gradients that the server averages for each learner step.
    With as many gradients as workers, and a max_staleness of 0, training is synchronous.
    It then equals that of one learner whose batches are that many times as large."""
    max_loss_deviations: float | None = 10.0
    """Standard deviations that a gradient's loss may be above the running mean.
    Gradients with a higher loss are dropped; None keeps all gradients."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are sent; the server computes in float32."""
    snapshot_period_learner_steps: int = 200
    """Learner steps between copies of the server's state in Ray's object store.
    If a shard of the server is lost, its replacement continues from such a copy."""
    max_failures: int = 10
    """Environments that may raise or die in a worker before the run fails; until then each is replaced."""
    worker_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Ray resources that each worker takes.
    The default is one CPU, which is also what each shard of the server and of the replay takes."""
    worker_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes for the workers, such as `market spot`; see `server_node_labels`."""
    server_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes for the shards of the server, as given to `ray start --labels`. Empty leaves it to Ray.
    Each is VALUE, !VALUE (any other, or none), in(VALUE,VALUE) or !in(VALUE,VALUE). They need Ray 2.50 or newer."""
    replay_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes for the shards of a replay that all workers share; see `server_node_labels`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_workers", "num_server_shards", maximum=MAX_PROCESSES)
        check_counts(self, "lanes_per_worker", "rows_per_chunk", maximum=MAX_SIZE)
        check_counts(self, "gradients_per_learner_step", "snapshot_period_learner_steps")
        check_counts(self, "num_replay_shards", "max_staleness", "max_failures", minimum=0)
        fits = self.num_replay_shards <= self.num_workers
        check(fits, "num_replay_shards", f"at most num_workers={self.num_workers}", self.num_replay_shards)
        check_positive(self, "max_loss_deviations", or_none=", or None")
        check_resources("worker_resources", self.worker_resources)
        rule = "left out with num_replay_shards=0, because workers then keep their transitions themselves"
        has_effect = self.num_replay_shards > 0 or not self.replay_node_labels
        check(has_effect, "replay_node_labels", rule, dict(self.replay_node_labels))

    @property
    def num_busy_processes(self) -> int:
        """The workers, and the shards of the server and of the replay."""
        return self.num_workers + self.num_server_shards + self.num_replay_shards

    @property
    def num_envs(self) -> int:
        """Number of lanes of all workers together."""
        return self.num_workers * self.lanes_per_worker

    @property
    def mesh(self) -> MeshConfig:
        """One device, because each worker learns on its own device."""
        return MeshConfig()

    @property
    def actor_pool(self) -> ActorPool:
        """The workers, and the shards of the replay. Unless the workers share a replay, each is its own shard."""
        num_shards = self.num_replay_shards or self.num_workers
        return ActorPool(self.num_workers, self.lanes_per_worker, self.rows_per_chunk, num_shards)

    @property
    def lane_options(self) -> LaneOptions:
        """How each worker's environments are stepped: in the worker itself."""
        return LaneOptions(max_failures=self.max_failures)

    @property
    def lane_division(self) -> Division:
        """Each worker has its own lanes and batches, so they need not divide over anything."""
        return Division("", 1)

    def check_agent(self, agent: AgentConfig) -> None:
        """Checks that the agent has a replay, and that gradients of one learner step weigh as those of one batch."""
        check_learns_while_others_act(self.name, agent)
        check(
            self.gradients_per_learner_step == 1 or agent.importance_normalisation == "none",
            "importance_normalisation",
            f"none with gradients_per_learner_step={self.gradients_per_learner_step}, because each of these gradients "
            f"would be divided by the greatest weight of its own batch", agent.importance_normalisation,
        )  # fmt: skip

    def describe_lanes(self, backend: str) -> str:
        """Returns the number of lanes and of workers."""
        return f"{self.num_envs} over {self.num_workers} workers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GossipConfig(LaneOptions, RayTopologyConfig):
    """Where it runs: peers that each learn on their own and now and then average parameters in pairs, on Ray.

    Each peer runs the fused or the overlapped topology, whichever suits the environment. No peer waits for another.
    Source: Lian et al. 2018, arXiv 1710.06952.
    """

    name: ClassVar[str] = "gossip"
    summary: ClassVar[str] = "peers that learn on their own and now and then average parameters in pairs, on Ray"
    replays_with_memory: ClassVar[tuple[str, ...]] = ("none",)

    silence_seconds: float = 60.0
    """Longest time that a peer may take to reply. One that takes longer is replaced, like one that died."""
    max_restarts: int = 3
    """Number of times that one peer may be replaced within ten minutes before the run fails."""
    lock_step: bool = False
    """Wait for each row's learning before the next action, as in the overlapped topology."""
    num_envs: int = 32
    """Lanes: environments stepped at once, over all peers."""
    num_processes: int = 2
    """Number of peers."""
    devices_per_process: int = 1
    """Devices of each peer. A CPU is divided into that many devices."""
    gossip_period_learner_steps: int = 100
    """Learner steps after its last exchange when a peer starts another exchange, with a peer chosen at random."""
    process_node_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes for the peers, as given to `ray start --labels`. Empty leaves the choice to Ray.
    Each is VALUE, !VALUE (any other, or none), in(VALUE,VALUE) or !in(VALUE,VALUE). They need Ray 2.50 or newer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_envs", self.num_envs, maximum=MAX_SIZE)
        check_counts(self, "num_processes", "devices_per_process", maximum=MAX_PROCESSES)
        check_count("gossip_period_learner_steps", self.gossip_period_learner_steps)
        each = self.num_envs // self.num_processes
        fits = self.num_env_workers <= each
        check(fits, "num_env_workers", f"at most num_envs / num_processes={each}", self.num_env_workers)

    @property
    def mesh(self) -> MeshConfig:
        """The devices of all peers."""
        return MeshConfig(data=self.num_processes * self.devices_per_process)

    @property
    def cpu_devices(self) -> int:
        """As many devices as a peer has, so that this process can compute a peer's footprint from shapes."""
        return self.devices_per_process

    @property
    def num_busy_processes(self) -> int:
        """The devices of all peers, and their environment workers."""
        return self.num_processes * (self.devices_per_process + self.num_env_workers)

    @property
    def actor_pool(self) -> ActorPool:
        """The peers. Each is a shard of its own, and keeps its own segment of the replay."""
        return ActorPool(self.num_processes, self.num_envs // self.num_processes, 1, self.num_processes)

    @property
    def lane_division(self) -> Division:
        """Lanes divide over the devices of all peers."""
        return Division("num_processes x devices_per_process", self.mesh.data)

    @property
    def batch_division(self) -> Division:
        """Each peer has its own batches, which divide over its devices."""
        return Division("devices_per_process", self.devices_per_process)

    def describe_lanes(self, backend: str) -> str:
        """Returns the number of lanes and of peers."""
        return f"{self.num_envs} over {self.num_processes} peers"
