"""One run: what to learn, where, and when to evaluate, save and stop."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from qfleet.config.agent import AgentConfig
from qfleet.config.checks import check, check_count, check_divides
from qfleet.config.errors import ConfigError
from qfleet.config.topologies import FusedConfig
from qfleet.config.topology import MeshConfig, TopologyConfig

T = TypeVar("T", bound=TopologyConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: an environment, an agent, a topology, and when to evaluate, save and stop."""

    env: str
    """Name of the environment, as listed by `qfleet envs`."""
    env_options: Mapping[str, float | bool | str] = dataclasses.field(default_factory=dict)
    """Arguments of the function that makes the environment, such as ALE's `repeat_action_probability`."""
    preset: str = "custom"
    """Name of the preset that the agent's settings came from. It is only recorded, and changes nothing."""
    agent: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    topology: TopologyConfig = dataclasses.field(default_factory=FusedConfig)
    seed: int = 0
    """Seed of all randomness. With the same config and kind of device, the same seed gives the same run."""
    num_seeds: int = 1
    """Number of independent learners trained at once, with the seeds `seed, seed + 1, ...`."""
    env_steps: int = 500_000
    """Environment steps after which the run stops, over all lanes of one seed."""
    stop_return: float | None = None
    """Mean greedy return at which the run stops, once 100 fresh episodes confirm it."""
    eval_period_env_steps: int = 10_000
    """Environment steps between greedy evaluations."""
    eval_episodes: int = 20
    """Greedy episodes per evaluation."""
    video_period_env_steps: int | None = None
    """Environment steps between videos of a greedy episode; None records none.
    Each video is recorded at the next evaluation."""
    run_dir: str | None = None
    """Folder of the run. The default is `runs/<env>-<preset>-<seed>-<time>`."""
    checkpoint_period_seconds: float = 60.0
    """Seconds between checkpoints."""
    checkpoints_kept: int = 3
    """Number of checkpoints kept on disk: the newest ones."""
    checkpoint_replay: bool = True
    """Store the replay in checkpoints; without it a resumed run warms up anew and differs."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "env_steps", "eval_period_env_steps", "eval_episodes", "checkpoints_kept"):
            check_count(name, getattr(self, name))
        if self.video_period_env_steps is not None:
            check_count("video_period_env_steps", self.video_period_env_steps)
        check_count("seed", self.seed, minimum=0)
        check(self.seed + self.num_seeds <= 2**32, "seed + num_seeds", "at most 2**32", self.seed + self.num_seeds)
        check(
            self.checkpoint_period_seconds > 0, "checkpoint_period_seconds", "positive", self.checkpoint_period_seconds
        )
        mesh = self.topology.mesh
        check(
            self.num_seeds == 1 or mesh == MeshConfig(),
            "num_seeds", "1 on a mesh, because several seeds are spread over the devices without one", self.num_seeds,
        )  # fmt: skip
        _check_sizes(self.agent, self.topology)

    def topology_as(self, kind: type[T]) -> T:
        """Returns the topology's config with its own type, for code that belongs to that topology only.

        Raises:
          TypeError: if the run has another topology.
        """
        if not isinstance(self.topology, kind):
            raise TypeError(f"a run of topology {kind.name} must have its config, got {self.topology}")
        return self.topology


def _check_sizes(agent: AgentConfig, topology: TopologyConfig) -> None:
    """Checks that sizes of agent and topology fit together, and that 32 bits can index the arrays."""
    topology.check_agent(agent)
    num_lanes, over = topology.num_envs, topology.lane_division
    check_divides("num_envs", num_lanes, *over)
    if agent.replay == "none":
        _check_rollouts(agent, topology)
        return
    check_divides("batch_size", agent.batch_size, *topology.batch_division)
    check(agent.replay_capacity < 2**31, "replay_capacity", "below 2**31", agent.replay_capacity)
    fewest = num_lanes * (agent.n_step + 2)
    if agent.replay_capacity < fewest:
        raise ConfigError(
            f"replay_capacity must hold at least n_step + 2 steps of each lane, got replay_capacity="
            f"{agent.replay_capacity}, num_envs={num_lanes}, n_step={agent.n_step}; try {fewest}"
        )


def _check_rollouts(agent: AgentConfig, topology: TopologyConfig) -> None:
    num_lanes, over = topology.num_envs, topology.lane_division
    num_samples = num_lanes * agent.rollout_length
    check(num_samples < 2**31, "num_envs x rollout_length", "below 2**31", num_samples)
    num_own = num_samples // over.num_shares
    if num_own % agent.num_minibatches:
        fitting = max(n for n in range(1, agent.num_minibatches) if num_own % n == 0)
        raise ConfigError(
            f"num_minibatches must divide num_envs x rollout_length (over {over.name}), got num_minibatches="
            f"{agent.num_minibatches}, {num_lanes} x {agent.rollout_length} / {over.num_shares} = {num_own}; "
            f"try {fitting}"
        )
