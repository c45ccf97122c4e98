"""One run: what to learn, where, and when to evaluate, save and stop."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from qfleet.config.agent import SHARES, AgentConfig
from qfleet.config.checks import (
    MAX_COUNT,
    MAX_EPISODES,
    MAX_PROCESSES,
    MAX_SEED,
    MAX_SIZE,
    check,
    check_count,
    check_counts,
    check_divides,
    check_positive,
)
from qfleet.config.errors import ConfigError
from qfleet.config.topologies import TOPOLOGIES, FusedConfig
from qfleet.config.topology import MeshConfig, TopologyConfig
from qfleet.config.values import Config

T = TypeVar("T", bound=TopologyConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """One run: an environment, an agent, a topology, and when to evaluate, save and stop."""

    env: str
    """Name of the environment, as listed by `qfleet envs`."""
    env_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the function that makes the environment, such as ALE's `repeat_action_probability`.
    On the command line: `--env-options max_episode_steps 50 is_slippery false map_name 8x8`. Lists, and text that looks
    like a number, are written as in JSON: `'[0.5, 1]'`, `'"50"'`."""
    preset: str = "custom"
    """Name of the preset that the agent's settings came from. It is only recorded, and changes nothing."""
    agent: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    topology: TopologyConfig = dataclasses.field(default_factory=FusedConfig)
    seed: int = 0
    """Seed of all randomness. With the same config and kind of device, the same seed gives the same run."""
    num_seeds: int = 1
    """Number of independent learners to train, with the seeds `seed, seed + 1, ...`.
    They are trained in one program if the topology is `fused`, without a mesh, and otherwise in a process each."""
    env_steps: int = 500_000
    """Environment steps after which the run stops, over all lanes of one seed."""
    stop_return: float | None = None
    """Mean greedy return at which the run stops, once 100 fresh episodes confirm it."""
    eval_period_env_steps: int = 10_000
    """Environment steps between greedy evaluations."""
    eval_episodes: int = 20
    """Greedy episodes per evaluation."""
    eval_exploration: float = 0.0
    """Probability of a uniformly random action in evaluations.
    Without any, a greedy policy plays the same few episodes again and again where the environment is deterministic."""
    eval_max_episode_steps: int | None = None
    """Environment steps after which an evaluation cuts an episode; None leaves it to the environment's time limit.
    Without a time limit, None means ten times the mean length of training episodes, between 1,000 and 27,000, or less
    if evaluations would take more environment steps than training."""
    video_period_env_steps: int | None = None
    """Environment steps between videos of a greedy episode; None records none.
    Each video is recorded at the next evaluation."""
    run_dir: str | None = None
    """Folder of the run. The default is `runs/<env>-<preset>-<seed>-<time>`."""
    checkpoint_period_seconds: float = 60.0
    """Seconds between checkpoints."""
    checkpoints_kept: int = 3
    """Number of checkpoints kept on disk: the newest ones."""
    checkpoint_best: bool = True
    """Keep the learner of the best evaluation beside the newest checkpoints, as `--checkpoint best`.
    An evaluation that beats the best one is confirmed by as many fresh episodes, so it takes up to twice as long."""
    checkpoint_replay: bool = True
    """Store the replay in checkpoints; without it a resumed run warms up anew and differs."""
    report: bool = True
    """Write `report.html` into the run's folder at the end: curves, settings and versions as one page, some 3 MB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in (("agent", [AgentConfig]), ("topology", TOPOLOGIES.values())):
            kind = type(getattr(self, name))
            check(kind in kinds, name, "of a class of qfleet, which config.json can hold", kind.__name__)
        check_count("num_seeds", self.num_seeds, maximum=MAX_PROCESSES)
        check_count("eval_episodes", self.eval_episodes, maximum=MAX_EPISODES)
        check_counts(self, "env_steps", "eval_period_env_steps", "checkpoints_kept")
        if self.video_period_env_steps is not None:
            check_count("video_period_env_steps", self.video_period_env_steps)
        check(0 <= self.eval_exploration < 1, "eval_exploration", "at least 0 and below 1", self.eval_exploration)
        if self.eval_max_episode_steps is not None:
            check_count("eval_max_episode_steps", self.eval_max_episode_steps, maximum=MAX_SIZE)
        check_count("seed", self.seed, minimum=0)
        check(
            self.seed + self.num_seeds - 1 <= MAX_SEED, "seed + num_seeds", "at most 2**32", self.seed + self.num_seeds
        )
        check_positive(self, "checkpoint_period_seconds", maximum=MAX_COUNT)
        is_path = self.run_dir is None or (self.run_dir != "" and "\0" not in self.run_dir)
        check(is_path, "run_dir", "the path of a folder", self.run_dir)
        if self.num_seeds > 1 and self.topology.is_started_by_hand:
            raise ConfigError(
                f"num_seeds must be 1 where each process is started by hand, got num_seeds={self.num_seeds}; start the "
                f"processes of each seed in turn, with --seed, or leave coordinator and process_id out"
            )
        _check_sizes(self.agent, self.topology)

    def with_schedule_lengths(self) -> "TrainConfig":
        """Returns the config with numbers in place of schedules that last a share of the run, or until its end.

        A run's folder keeps the result. So a run that is extended later keeps the schedules that it began with, and
        what it learns doesn't depend on where it was interrupted.
        """
        agent = self.agent
        changes: dict[str, Any] = {}
        for share_name, name in SHARES.items():
            share = getattr(agent, share_name)
            if share is None and getattr(agent, name) is not None:
                continue
            whole = self.num_learner_steps if name.endswith("learner_steps") else self.env_steps
            changes |= {share_name: None, name: max(1, round(whole * (1.0 if share is None else share)))}
        return dataclasses.replace(self, agent=dataclasses.replace(agent, **changes)) if changes else self

    @property
    def num_learner_steps(self) -> int:
        """Learner steps of the whole run, over all processes, up to what its last chunk adds."""
        agent = self.agent
        if agent.replay == "none":
            num_rollouts = math.ceil(self.env_steps / (self.topology.num_envs * agent.rollout_length))
            return num_rollouts * agent.num_epochs * agent.num_minibatches
        return int(max(0, self.env_steps - agent.warmup_env_steps) / agent.env_steps_per_learner_step)

    @property
    def has_seed_processes(self) -> bool:
        """Whether each seed is trained in a process of its own, because one program can't train all of them."""
        is_one_program = isinstance(self.topology, FusedConfig) and self.topology.mesh == MeshConfig()
        return self.num_seeds > 1 and not is_one_program

    @property
    def seeds(self) -> range:
        """The seeds of all learners."""
        return range(self.seed, self.seed + self.num_seeds)

    def of_seed(self, seed: int) -> "TrainConfig":
        """Returns the config of a run that trains one of the seeds on its own, in a folder that isn't named yet.

        Only the first seed is filmed, as in a run that trains all of them in one program. There is one report of all.
        """
        changes: dict[str, Any] = {"seed": seed, "num_seeds": 1, "run_dir": None, "report": False}
        if seed != self.seed:
            changes["video_period_env_steps"] = None
        return dataclasses.replace(self, **changes)

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
    check(num_lanes <= MAX_SIZE, "num_envs", f"at most {MAX_SIZE}", num_lanes)
    check_divides("num_envs", num_lanes, *over)
    if agent.replay == "none":
        _check_rollouts(agent, topology)
        return
    check_divides("batch_size", agent.batch_size, *topology.batch_division)
    fewest = num_lanes * (agent.n_step + 2)
    if agent.replay_capacity < fewest:
        raise ConfigError(
            f"replay_capacity must hold at least n_step + 2 steps of each lane, got replay_capacity="
            f"{agent.replay_capacity}, num_envs={num_lanes}, n_step={agent.n_step}; "
            f"try {fewest if fewest <= MAX_SIZE else 'a smaller num_envs or n_step'}"
        )
    per_row = num_lanes / agent.env_steps_per_learner_step
    check(
        per_row <= MAX_SIZE,
        "num_envs / env_steps_per_learner_step, the learner steps after one step of all lanes,", f"at most {MAX_SIZE}",
        per_row,
    )  # fmt: skip


def _check_rollouts(agent: AgentConfig, topology: TopologyConfig) -> None:
    num_lanes, over = topology.num_envs, topology.lane_division
    num_samples = num_lanes * agent.rollout_length
    check(num_samples <= MAX_SIZE, "num_envs x rollout_length", f"at most {MAX_SIZE}", num_samples)
    num_own = num_samples // over.num_shares
    if agent.memory != "none" and (num_lanes // over.num_shares) % agent.num_minibatches:
        raise ConfigError(
            f"num_minibatches must divide num_envs (over {over.name}) with memory {agent.memory}, because a minibatch "
            f"takes whole lanes, got num_minibatches={agent.num_minibatches}, {num_lanes} / {over.num_shares} = "
            f"{num_lanes // over.num_shares}; "
            f"try {_largest_divisor(num_lanes // over.num_shares, agent.num_minibatches)}"
        )
    if num_own % agent.num_minibatches:
        raise ConfigError(
            f"num_minibatches must divide num_envs x rollout_length (over {over.name}), got num_minibatches="
            f"{agent.num_minibatches}, {num_lanes} x {agent.rollout_length} / {over.num_shares} = {num_own}; "
            f"try {_largest_divisor(num_own, agent.num_minibatches)}"
        )


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number that is at most `limit`."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return max(n for n in (*low, *(number // n for n in low)) if n <= limit)
