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
            "num_seeds", "1 on a mesh: many seeds are spread over the devices by themselves", self.num_seeds,
        )  # fmt: skip
        _check_sizes(self.agent, self.topology)

    def topology_as(self, kind: type[T]) -> T:
        """Returns the config of where it runs, for code of that topology alone.

        Raises:
          TypeError: if it is another topology's.
        """
        if not isinstance(self.topology, kind):
            raise TypeError(f"a run of topology {kind.name} must have its config, got {self.topology}")
        return self.topology


def _check_sizes(agent: AgentConfig, topology: TopologyConfig) -> None:
    """Checks sizes that must fit each other across agent and topology, and the 32 bits that index arrays."""
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
