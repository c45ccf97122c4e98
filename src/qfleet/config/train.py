"""What is learned (`AgentConfig`), where it runs (one config per topology), and one run (`TrainConfig`).

Nothing here imports JAX, so that the command line can explain itself at once. Every config is checked when
it is constructed and never changed afterwards; `dataclasses.replace` makes another.
"""

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple


class ConfigError(ValueError):
    """Bad input: the message says the rule, the value that broke it, and the remedy."""


class RunFailed(RuntimeError):
    """The run can't go on: the message says what happened where. Checkpoints written before are sound."""

    def __init__(self, message: str, *, learner_is_sound: bool = False) -> None:
        super().__init__(message)
        self.learner_is_sound = learner_is_sound
        """Whether what was learned until then is worth a checkpoint, for the failure was not its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What is learned. Knows nothing of processes, devices or queues.

    Options compose: `double`, `dueling`, `n_step` and prioritised `replay` together are the core of Rainbow
    (Hessel et al. 2018, arXiv 1710.02298); `replay="none"` is Q(lambda) without replay or target network
    (PQN, Gallici et al. 2024, arXiv 2407.04811). `PRESETS` names the well-known combinations.
    """

    discount: float = 0.99
    """Per environment step, in (0, 1]."""
    double: bool = False
    """The online network picks the bootstrap action, the target network values it (van Hasselt et al. 2016)."""
    n_step: int = 1
    """Rewards summed before bootstrapping, in environment steps. Without replay, `trace_decay` does this."""
    loss: Literal["squared", "huber"] = "huber"
    """Of the TD error. Huber is squared up to `huber_delta` and linear beyond (Mnih et al. 2015's clipping)."""
    huber_delta: float = 1.0
    """Where Huber turns linear, in units of discounted reward."""

    torso: Literal["auto", "mlp", "minatar", "nature"] = "auto"
    """Convolutions before the dense layers; `auto`: by the observation's shape (vector, small or Atari-sized)."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Units of each dense layer after the torso."""
    layer_norm: bool = False
    """Layer normalisation after each hidden layer, before its activation."""
    dueling: bool = False
    """Value and advantage streams (Wang et al. 2016, arXiv 1511.06581)."""
    convolution: Literal["auto", "patches", "native"] = "auto"
    """How convolutions are lowered; `auto` is patches times a matrix on CPU, native elsewhere. Same numbers."""

    exploration: Literal["epsilon_greedy", "softmax"] = "epsilon_greedy"
    """Softmax is Boltzmann exploration: probabilities softmax(q / temperature)."""
    exploration_start: float = 1.0
    """Epsilon (a probability), or the temperature in units of discounted reward, at the first step."""
    exploration_end: float = 0.05
    """The same, once it has decayed."""
    exploration_schedule: Literal["linear", "exponential"] = "linear"
    """How it decays from start to end."""
    exploration_env_steps: int = 25_000
    """Environment steps (of all lanes together) the decay takes."""

    optimiser: str = "adam"
    """Any optimiser of Optax by its function's name: adam, adamw, radam, rmsprop, sgd, lion ..."""
    optimiser_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Further arguments of that function, such as `eps`."""
    learning_rate: float = 1e-3
    """At the first learner step."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """How it changes over `learning_rate_learner_steps`."""
    learning_rate_end_fraction: float = 0.0
    """Final learning rate as a fraction of the first; above 0 for the exponential schedule."""
    learning_rate_learner_steps: int = 100_000
    """Learner steps that the schedule takes."""
    max_gradient_norm: float | None = 10.0
    """Gradients are scaled down to this global norm; None leaves them alone."""

    replay: Literal["uniform", "prioritised", "none"] = "uniform"
    """`prioritised` is proportional (Schaul et al. 2016, arXiv 1511.05952); `none` is Q(lambda)."""
    batch_size: int = 128
    """Transitions per learner step, over all replicas. Unused without replay."""
    replay_capacity: int = 100_000
    """Environment steps kept, over all lanes."""
    warmup_env_steps: int = 1_000
    """Environment steps, over all lanes, before the first learner step."""
    env_steps_per_learner_step: float = 10.0
    """Environment steps, over all lanes, for each learner step. Changing the number of lanes changes nothing."""
    target_update_period: int = 500
    """Learner steps between updates of the target network."""
    target_update_rate: float = 1.0
    """Share of the online parameters in each such update: 1 copies, less is Polyak averaging (period 1)."""
    priority_exponent: float = 0.6
    """Alpha: 0 is uniform, 1 fully proportional to the TD error."""
    importance_exponent_start: float = 0.4
    """Beta at the first step; 1 corrects the sampling bias in full."""
    importance_exponent_env_steps: int = 100_000
    """Environment steps over which beta grows to 1."""

    rollout_length: int = 16
    """Q(lambda): environment steps per lane between two rounds of learning."""
    trace_decay: float = 0.65
    """Q(lambda): lambda; 0 bootstraps after one step, 1 after the whole rollout."""
    num_epochs: int = 2
    """Q(lambda): passes over each rollout."""
    num_minibatches: int = 1
    """Q(lambda): learner steps per pass."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("discount", "target_update_rate"):
            _check(0.0 < getattr(self, name) <= 1.0, name, "in (0, 1]", getattr(self, name))
        for name in ("trace_decay", "priority_exponent", "importance_exponent_start", "learning_rate_end_fraction"):
            _check(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]", getattr(self, name))
        for name in (
            "n_step", "batch_size", "replay_capacity", "target_update_period", "rollout_length", "num_epochs",
            "num_minibatches", "exploration_env_steps", "learning_rate_learner_steps",
            "importance_exponent_env_steps",
        ):  # fmt: skip
            _check_count(name, getattr(self, name))
        for name in ("huber_delta", "learning_rate", "env_steps_per_learner_step"):
            _check(0.0 < getattr(self, name) < math.inf, name, "positive and finite", getattr(self, name))
        _check_count("warmup_env_steps", self.warmup_env_steps, minimum=0)
        _check(
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "max_gradient_norm", "positive, or None to leave gradients alone", self.max_gradient_norm,
        )  # fmt: skip
        _check(all(size >= 1 for size in self.hidden_sizes), "hidden_sizes", "all at least 1", self.hidden_sizes)
        highest = 1.0 if self.exploration == "epsilon_greedy" else sys.float_info.max
        lowest_end = 0.0 if self.exploration_schedule == "linear" and self.exploration == "epsilon_greedy" else 1e-8
        _check(
            lowest_end <= self.exploration_end <= self.exploration_start <= highest,
            "exploration_end and exploration_start", f"in order within [{lowest_end:g}, {highest:g}]",
            (self.exploration_end, self.exploration_start),
        )  # fmt: skip
        if self.learning_rate_schedule == "exponential":
            _check(
                self.learning_rate_end_fraction > 0,
                "learning_rate_end_fraction", "above 0 for an exponential schedule", self.learning_rate_end_fraction,
            )  # fmt: skip

    @property
    def replay_ratio(self) -> float:
        """Times each environment step is learned from, on average."""
        if self.replay == "none":
            return float(self.num_epochs)
        return self.batch_size / self.env_steps_per_learner_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices of a run, arranged as `data` times `model`. The same program runs on 1 x 1 as on any other."""

    data: int = 1
    """Devices over which lanes, replay and each batch are divided; gradients are averaged over them."""
    model: int = 1
    """Devices over which the network, its target and the optimiser's moments are divided."""

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            _check_count(f"mesh.{name}", getattr(self, name))

    @property
    def num_devices(self) -> int:
        """How many it takes."""
        return self.data * self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedConfig:
    """Where it runs: acting and learning in one compiled program."""

    num_envs: int = 32
    """Lanes: environments stepped at once, over all devices."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices that share the work."""

    def __post_init__(self) -> None:
        _check_count("num_envs", self.num_envs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HostLanesConfig:
    """How environments of other libraries step."""

    num_workers: int = 0
    """Processes that step environments which have no threads of their own; 0 steps them in this process."""
    step_timeout_seconds: float = 60.0
    """A worker that takes longer over one step counts as hung, and is replaced."""
    max_failures: int = 10
    """Environments that may raise, hang or die before the run fails; each is replaced until then."""

    def __post_init__(self) -> None:
        check_lane_options(self.num_workers, self.step_timeout_seconds, self.max_failures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OverlappingConfig(_HostLanesConfig):
    """How they step while a learner in the same process learns."""

    lock_step: bool = False
    """Wait for each row's learning before the next action: deterministic where the environments are, and slower.
    Without replay it is always so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlappedConfig(_OverlappingConfig):
    """Where it runs: environments of other libraries step in threads or processes while the learner learns."""

    num_envs: int = 8
    """Lanes: environments stepped at once, over all devices."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices that share the work."""
    profile: bool = False
    """Measure where the time goes: environment, transfer, inference, replay, update. In lock step, each part waited
    for by itself, so that it can be timed: slower, and for measuring only. What is learned is the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("num_envs", self.num_envs)
        _check(self.num_workers <= self.num_envs, "num_workers", f"at most num_envs={self.num_envs}", self.num_workers)
        _check(
            not self.profile or self.mesh.num_devices == 1,
            "mesh.data x mesh.model", "1 with profile, which times one device", self.mesh.num_devices,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecentralisedConfig(_OverlappingConfig):
    """Where it runs: equal processes, each with its share of lanes and replay; no server.

    In step by all-reduce, each is a fused or an overlapped run, as suits the environment, on a mesh over the devices of
    all of them. By gossip each is such a run of its own.
    """

    num_envs: int = 32
    """Lanes: environments stepped at once, over all processes."""
    num_processes: int = 2
    """Equal processes, over all hosts."""
    exchange: Literal["all-reduce", "gossip"] = "all-reduce"
    """all-reduce: gradients, at every learner step, so all wait for the slowest. gossip, on Ray: each learns by itself,
    and now and then takes the mean of its parameters and those of another, chosen at random (Lian et al. 2018, arXiv
    1710.06952); nobody waits for anybody."""
    gossip_period_learner_steps: int = 100
    """Learner steps, with gossip, after which a process that has met nobody meets another. Unused with all-reduce."""
    devices_per_process: int = 1
    """Devices of each. On a CPU they are made of it."""
    coordinator: str | None = None
    """HOST:PORT of the first process, to start each by hand, on one host or several that share the run's folder. None
    starts all of them on this one."""
    process_id: int | None = None
    """With `coordinator`: which of the processes to start here, from 0."""
    ray_address: str | None = None
    """Address of a Ray cluster that places the processes, one per host or GPU, as `auto` or HOST:PORT; `local` starts
    one on this machine and ends it. Without it, all-reduce doesn't use Ray, and gossip uses a local one."""
    peer_timeout_seconds: float = 60.0
    """A process that says nothing for so long counts as lost, as one that died does. Then all stop, and start again
    from the newest checkpoint; with gossip, that one only is replaced."""
    max_restarts: int = 3
    """Times that all may start again before the run fails; with gossip, that one may be replaced in ten minutes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choices(self)
        for name in ("num_envs", "num_processes", "gossip_period_learner_steps", "devices_per_process"):
            _check_count(name, getattr(self, name))
        _check_count("max_restarts", self.max_restarts, minimum=0)
        _check(self.peer_timeout_seconds >= 5, "peer_timeout_seconds", "at least 5", self.peer_timeout_seconds)
        each = self.num_envs // self.num_processes
        _check(self.num_workers <= each, "num_workers", f"at most num_envs / num_processes={each}", self.num_workers)
        by_hand = self.coordinator is not None
        _check(
            by_hand == (self.process_id is not None),
            "coordinator and process_id", "given together, or neither to start all processes here",
            (self.coordinator, self.process_id),
        )  # fmt: skip
        _check(
            not (by_hand and self.gossips),
            "coordinator and process_id", "left out with exchange gossip, whose processes Ray starts: give ray_address "
            "for those of a cluster, or nothing for this machine", (self.coordinator, self.process_id),
        )  # fmt: skip
        if self.ray_address is not None:
            rule = "given without coordinator and process_id, for Ray places all processes"
            _check(not by_hand, "ray_address", rule, (self.ray_address, self.coordinator, self.process_id))
            _check_ray_address(self.ray_address)
        if self.coordinator is not None and self.process_id is not None:
            _check(_is_host_and_port(self.coordinator), "coordinator", "HOST:PORT", self.coordinator)
            known = f"0 to num_processes - 1 = {self.num_processes - 1}"
            _check(0 <= self.process_id < self.num_processes, "process_id", known, self.process_id)

    @property
    def gossips(self) -> bool:
        """Whether each process learns on its own."""
        return self.exchange == "gossip"

    @property
    def mesh(self) -> MeshConfig:
        """The devices of all processes."""
        return MeshConfig(data=self.num_processes * self.devices_per_process)

    @property
    def profile(self) -> bool:
        """Never: one process alone can't be timed in parts."""
        return False


class ActorPool(NamedTuple):
    """Processes that act on their own, and the shards of the replay that keep what they do."""

    num_actors: int
    lanes_per_actor: int
    rows_per_chunk: int
    """Steps of each lane that an actor takes at once."""
    num_shards: int

    @property
    def num_lanes(self) -> int:
        """Of all actors."""
        return self.num_actors * self.lanes_per_actor

    def actors_of(self, shard: int) -> list[int]:
        """Returns the actors whose transitions a shard, numbered from 0, keeps."""
        return list(range(shard, self.num_actors, self.num_shards))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorLearnerConfig(_HostLanesConfig):
    """Where it runs: many actors feed a global replay, and one learner learns from it (Ape-X), on Ray.

    Source: Horgan et al. 2018, arXiv 1803.00933.
    """

    num_actors: int = 4
    """Processes that act, each with lanes and an epsilon of its own."""
    lanes_per_actor: int = 4
    """Environments that each of them steps at once."""
    num_replay_shards: int = 1
    """Processes that share the replay, each with the transitions of some actors."""
    rows_per_chunk: int = 32
    """Steps of each lane that an actor sends at once. For each chunk it takes the parameters that were the newest when
    it was asked, which is a chunk ahead."""
    broadcast_period_learner_steps: int = 100
    """Learner steps between parameters that actors can take."""
    ladder_base: float = 0.4
    """Epsilon of the first actor."""
    ladder_exponent: float = 7.0
    """Actor i of N explores with epsilon `ladder_base ** (1 + i / (N - 1) * ladder_exponent)`."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The learner's devices."""
    actor_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What of Ray's resources each actor takes, and each shard of the replay; by default a CPU."""
    learner_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the learner takes; by default a CPU, and a GPU for each device of its mesh if the cluster has so many."""
    ray_address: str = "local"
    """Address of a Ray cluster, as `auto` or HOST:PORT; `local` starts one on this machine and ends it."""
    silence_seconds: float = 90.0
    """A part that was asked for something and says nothing for so long is replaced, as one that died is."""
    max_restarts: int = 5
    """Times that one part may be replaced within ten minutes before the run fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "num_actors", "lanes_per_actor", "num_replay_shards", "rows_per_chunk", "broadcast_period_learner_steps",
        ):  # fmt: skip
            _check_count(name, getattr(self, name))
        _check_count("max_restarts", self.max_restarts, minimum=0)
        fits = self.num_replay_shards <= self.num_actors
        _check(fits, "num_replay_shards", f"at most num_actors={self.num_actors}", self.num_replay_shards)
        fits = self.num_workers <= self.lanes_per_actor
        _check(fits, "num_workers", f"at most lanes_per_actor={self.lanes_per_actor}", self.num_workers)
        _check(0.0 < self.ladder_base <= 1.0, "ladder_base", "in (0, 1]", self.ladder_base)
        _check(0.0 <= self.ladder_exponent < math.inf, "ladder_exponent", "at least 0", self.ladder_exponent)
        _check(self.silence_seconds >= 5, "silence_seconds", "at least 5", self.silence_seconds)
        _check(
            not self.num_workers or self.silence_seconds > self.step_timeout_seconds,
            "silence_seconds", f"above step_timeout_seconds={self.step_timeout_seconds:g}, or hung workers take their "
            f"actor with them", self.silence_seconds,
        )  # fmt: skip
        for name in ("actor_resources", "learner_resources"):
            amounts = getattr(self, name)
            _check(all(amount >= 0 for amount in amounts.values()), name, "all at least 0", dict(amounts))
        _check_ray_address(self.ray_address)

    @property
    def num_envs(self) -> int:
        """Lanes of all actors."""
        return self.num_actors * self.lanes_per_actor

    def epsilon(self, actor: int) -> float:
        """Returns with which probability an actor, numbered from 0, takes a random action."""
        place = actor / (self.num_actors - 1) if self.num_actors > 1 else 0.0
        return float(self.ladder_base ** (1.0 + place * self.ladder_exponent))

    @property
    def actor_pool(self) -> ActorPool:
        """Who acts, and where it is kept."""
        return ActorPool(self.num_actors, self.lanes_per_actor, self.rows_per_chunk, self.num_replay_shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterServerConfig:
    """Where it runs: workers act and send gradients to a server, which applies them as they come (Gorila), on Ray.

    Source: Nair et al. 2015, arXiv 1507.04296.
    """

    num_workers: int = 4
    """Processes that act and compute gradients, each with lanes of its own."""
    lanes_per_worker: int = 4
    """Environments that each of them steps at once."""
    num_server_shards: int = 1
    """Processes that share the parameters, each with an equal part of them."""
    num_replay_shards: int = 0
    """Processes that keep what all workers do, for all to learn from. 0: each worker keeps its own, and learns from
    that."""
    rows_per_chunk: int = 16
    """Steps of each lane that a worker takes at once."""
    max_staleness: int = 16
    """Learner steps that the server may have taken since the parameters of a gradient; those of older ones are
    dropped."""
    gradients_per_learner_step: int = 1
    """Gradients whose mean the server applies at once. As many as workers, with a max_staleness of 0, is one learner
    with so much larger batches (synchronous)."""
    max_loss_deviations: float | None = 10.0
    """Gradients whose loss is above the running mean by more standard deviations than this are dropped. None keeps
    all."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients travel; the server computes in float32."""
    snapshot_period_learner_steps: int = 200
    """Learner steps between copies of the server's state, kept in Ray's object store: what a lost shard goes on
    from."""
    max_failures: int = 10
    """Environments that may raise or die in a worker before the run fails; each is replaced until then."""
    worker_resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What of Ray's resources each worker takes; by default a CPU, as each shard of the server and of the replay."""
    ray_address: str = "local"
    """Address of a Ray cluster, as `auto` or HOST:PORT; `local` starts one on this machine and ends it."""
    silence_seconds: float = 90.0
    """A part that was asked for something and says nothing for so long is replaced, as one that died is."""
    max_restarts: int = 5
    """Times that one part may be replaced within ten minutes before the run fails."""

    def __post_init__(self) -> None:
        for name in (
            "num_workers", "lanes_per_worker", "num_server_shards", "rows_per_chunk", "gradients_per_learner_step",
            "snapshot_period_learner_steps",
        ):  # fmt: skip
            _check_count(name, getattr(self, name))
        for name in ("num_replay_shards", "max_staleness", "max_failures", "max_restarts"):
            _check_count(name, getattr(self, name), minimum=0)
        _check_choices(self)
        fits = self.num_replay_shards <= self.num_workers
        _check(fits, "num_replay_shards", f"at most num_workers={self.num_workers}", self.num_replay_shards)
        limit = self.max_loss_deviations
        _check(limit is None or limit > 0, "max_loss_deviations", "positive, or None", limit)
        _check(self.silence_seconds >= 5, "silence_seconds", "at least 5", self.silence_seconds)
        amounts = self.worker_resources
        _check(all(amount >= 0 for amount in amounts.values()), "worker_resources", "all at least 0", dict(amounts))
        _check_ray_address(self.ray_address)

    @property
    def num_envs(self) -> int:
        """Lanes of all workers."""
        return self.num_workers * self.lanes_per_worker

    @property
    def mesh(self) -> MeshConfig:
        """One device: each worker has its own."""
        return MeshConfig()

    @property
    def actor_pool(self) -> ActorPool:
        """Who acts, and where it is kept: by each worker itself, unless they share a replay."""
        return ActorPool(
            self.num_workers, self.lanes_per_worker, self.rows_per_chunk, self.num_replay_shards or self.num_workers
        )


TopologyConfig = FusedConfig | OverlappedConfig | DecentralisedConfig | ActorLearnerConfig | ParameterServerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: an environment, an agent, a topology, and when to evaluate, save and stop."""

    env: str
    """Name, as `qfleet envs` lists them."""
    env_options: Mapping[str, float | bool | str] = dataclasses.field(default_factory=dict)
    """Arguments of the environment's maker, such as ALE's `repeat_action_probability`."""
    preset: str = "custom"
    """The preset that the agent's settings started from; a record, not a setting."""
    agent: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    topology: TopologyConfig = dataclasses.field(default_factory=FusedConfig)
    seed: int = 0
    """Same seed, same config, same kind of device: the same run."""
    num_seeds: int = 1
    """Independent learners trained at once, from seeds `seed, seed + 1, ...`."""
    env_steps: int = 500_000
    """Environment steps after which the run stops, over all lanes of one seed."""
    stop_return: float | None = None
    """Stop once the mean greedy return reaches this, and 100 fresh episodes confirm it."""
    eval_period_env_steps: int = 10_000
    """Environment steps between greedy evaluations."""
    eval_episodes: int = 20
    """Greedy episodes per evaluation."""
    video_period_env_steps: int | None = None
    """Environment steps between videos of a greedy episode, each at the next evaluation; None records none."""
    run_dir: str | None = None
    """Folder of the run; by default `runs/<env>-<preset>-<seed>-<time>`."""
    checkpoint_period_seconds: float = 60.0
    """Wall time between checkpoints."""
    checkpoints_kept: int = 3
    """Newest checkpoints kept on disk."""
    checkpoint_replay: bool = True
    """Whether checkpoints hold the replay; without it a resumed run warms up anew and differs."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "env_steps", "eval_period_env_steps", "eval_episodes", "checkpoints_kept"):
            _check_count(name, getattr(self, name))
        if self.video_period_env_steps is not None:
            _check_count("video_period_env_steps", self.video_period_env_steps)
        _check_count("seed", self.seed, minimum=0)
        _check(self.seed + self.num_seeds <= 2**32, "seed + num_seeds", "at most 2**32", self.seed + self.num_seeds)
        _check(
            self.checkpoint_period_seconds > 0, "checkpoint_period_seconds", "positive", self.checkpoint_period_seconds
        )
        mesh = self.topology.mesh
        _check(
            self.num_seeds == 1 or mesh == MeshConfig(),
            "num_seeds", "1 on a mesh: many seeds are spread over the devices by themselves", self.num_seeds,
        )  # fmt: skip
        _check_sizes(self.agent, self.topology)


TOPOLOGIES: dict[str, type[TopologyConfig]] = {
    "fused": FusedConfig,
    "overlapped": OverlappedConfig,
    "decentralised": DecentralisedConfig,
    "actor-learner": ActorLearnerConfig,
    "parameter-server": ParameterServerConfig,
}
"""Where a run can take place, by name."""


EXPLORATION_SCHEDULE = ("exploration_start", "exploration_end", "exploration_schedule", "exploration_env_steps")
"""Settings of an agent that a fleet's actors have no use for. It keeps them for where it may go on."""


def actor_pool_of(topology: TopologyConfig) -> ActorPool:
    """Returns who acts where that is processes of their own."""
    assert isinstance(topology, ActorLearnerConfig | ParameterServerConfig)
    return topology.actor_pool


def topology_name(topology: TopologyConfig) -> str:
    """Returns the name of the topology that a config describes."""
    return next(name for name, kind in TOPOLOGIES.items() if isinstance(topology, kind))


def is_launched(topology: TopologyConfig) -> bool:
    """Returns whether a run is in processes that a launcher starts, each of which trains it."""
    return isinstance(topology, DecentralisedConfig) and not topology.gossips


def check_suits(setting: str, topology: str) -> None:
    """Checks that a setting isn't another topology's, nor one that this topology has no use for.

    Raises:
      ConfigError: if it is.
    """
    if setting in EXPLORATION_SCHEDULE and topology == "actor-learner":
        raise ConfigError(
            f"{setting} must come with a topology whose exploration decays, got topology actor-learner, whose actors "
            f"have an epsilon each; give ladder_base and ladder_exponent instead"
        )
    if not suits(setting, topology):
        homes = [name for name, kind in TOPOLOGIES.items() if setting in _field_names(kind)]
        remedy = {
            "profile": "the host can't time the parts of one compiled program, so measure that with "
            "jax.profiler.trace or benchmarks/limit.py, or train in an environment outside it, such as gym:CartPole-v1",
        }.get(setting, f"leave it out, or choose topology {' or '.join(homes)}")
        raise ConfigError(f"{setting} must come with topology {' or '.join(homes)}, got topology {topology}; {remedy}")


def suits(setting: str, topology: str) -> bool:
    """Returns whether a setting isn't only other topologies'."""
    known = {name: _field_names(kind) for name, kind in TOPOLOGIES.items()}
    return setting in known[topology] or not any(setting in names for names in known.values())


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def check_lane_options(num_workers: int, step_timeout_seconds: float, max_failures: int) -> None:
    """Raises ConfigError if one of them is out of range; for `OverlappedConfig`, and for lanes without such a one."""
    _check_count("num_workers", num_workers, minimum=0)
    _check(step_timeout_seconds > 0, "step_timeout_seconds", "positive", step_timeout_seconds)
    _check_count("max_failures", max_failures, minimum=0)


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the names nearest to `word`, or '' if none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _check(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value}")


def _check_ray_address(address: str) -> None:
    is_known = address in ("auto", "local") or _is_host_and_port(address)
    _check(is_known, "ray_address", "auto, local or HOST:PORT", address)


def _is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdecimal()


def _check_choices(config: Any) -> None:
    """Checks every field whose type is a Literal."""
    for name, kind in typing.get_type_hints(type(config)).items():
        choices, value = typing.get_args(kind), getattr(config, name)
        if typing.get_origin(kind) is Literal and value not in choices:
            hint = suggest(str(value), choices)
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")


def _check_count(name: str, value: int, minimum: int = 1) -> None:
    _check(isinstance(value, int) and value >= minimum, name, f"a whole number, at least {minimum}", value)


def _check_sizes(agent: AgentConfig, topology: TopologyConfig) -> None:
    """Sizes that must fit each other across agent and topology, and the 32 bits that index arrays."""
    num_lanes, num_replicas = topology.num_envs, topology.mesh.data
    over = "num_processes x devices_per_process" if isinstance(topology, DecentralisedConfig) else "mesh.data"
    if isinstance(topology, ActorLearnerConfig | ParameterServerConfig):
        rule = f"uniform or prioritised with topology {topology_name(topology)}, which learns while others act"
        _check(agent.replay != "none", "replay", rule, agent.replay)
        if isinstance(topology, ActorLearnerConfig):
            rule = "epsilon_greedy with topology actor-learner"
            _check(agent.exploration == "epsilon_greedy", "exploration", rule, agent.exploration)
    else:
        _check_divides("num_envs", num_lanes, over, num_replicas)
    if agent.replay == "none":
        samples = num_lanes * agent.rollout_length
        _check(samples < 2**31, "num_envs x rollout_length", "below 2**31", samples)
        if samples // num_replicas % agent.num_minibatches:
            fitting = max(n for n in range(1, agent.num_minibatches) if samples // num_replicas % n == 0)
            raise ConfigError(
                f"num_minibatches must divide num_envs x rollout_length (over {over}), got num_minibatches="
                f"{agent.num_minibatches}, {num_lanes} x {agent.rollout_length} / {num_replicas} = "
                f"{samples // num_replicas}; try {fitting}"
            )
        return
    if isinstance(topology, DecentralisedConfig) and topology.gossips:  # the batch is each process's own
        over, num_replicas = "devices_per_process", topology.devices_per_process
    _check_divides("batch_size", agent.batch_size, over, num_replicas)
    _check(agent.replay_capacity < 2**31, "replay_capacity", "below 2**31", agent.replay_capacity)
    fewest = num_lanes * (agent.n_step + 2)
    if agent.replay_capacity < fewest:
        raise ConfigError(
            f"replay_capacity must hold at least n_step + 2 steps of each lane, got replay_capacity="
            f"{agent.replay_capacity}, num_envs={num_lanes}, n_step={agent.n_step}; try {fewest}"
        )


def _check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{name} must divide over {divisor_name}, got {name}={value}, {divisor_name}={divisor}; "
            f"try {math.ceil(value / divisor) * divisor}"
        )
