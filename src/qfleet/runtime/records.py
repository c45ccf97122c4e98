"""What a topology tells of a run while it goes on."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What happened since the last record. Means are over lanes and seeds; None where nothing happened."""

    env_steps: int
    """So far, over all lanes of one seed."""
    learner_steps: int
    """So far, of one seed."""
    train_seconds: float
    """Wall time of this record's training, without evaluation."""
    new_env_steps: int
    """Of this record, of one seed."""
    new_learner_steps: int
    num_episodes: int
    """Training episodes that ended, over all seeds."""
    episode_return_mean: float | None
    """Of those, undiscounted, with exploration."""
    episode_length_mean: float | None
    """Of those, in environment steps."""
    q_mean: float
    """Greatest Q-value of the observations acted on, in units of discounted reward."""
    loss: float | None
    td_error_mean: float | None
    """Mean absolute TD error of the batches, in units of discounted reward."""
    exploration: float
    """Epsilon, or the temperature, of the last row."""
    staleness: float = 0.0
    """Learner steps between the parameters that acted and the newest, mean over rows."""
    num_env_failures: int = 0
    """Environments that raised, hung or died, and were replaced."""
    part_seconds: Mapping[str, float] | None = None
    """`train_seconds` by the part that took them, if the run measures that."""
    fleet: Mapping[str, float] | None = None
    """How the parts of a fleet are doing, where there is one."""
    eval_returns: tuple[tuple[float, ...], ...] | None = None
    """Of the greedy episodes after it, `[seeds][episodes]`, if there were any."""

    @property
    def eval_return_mean(self) -> float | None:
        """Over all seeds' greedy episodes."""
        if self.eval_returns is None:
            return None
        return sum(map(sum, self.eval_returns)) / sum(map(len, self.eval_returns))

    def metrics(self) -> dict[str, float | None]:
        """Returns what a log keeps of it: single numbers by name."""
        values = dataclasses.asdict(self)
        for name in (
            "env_steps",
            "train_seconds",
            "new_env_steps",
            "new_learner_steps",
            "eval_returns",
            "part_seconds",
            "fleet",
        ):
            del values[name]
        values["env_steps_per_second"] = self.new_env_steps / self.train_seconds
        values["learner_steps_per_second"] = self.new_learner_steps / self.train_seconds
        values["eval_return_mean"] = self.eval_return_mean
        for part, seconds in (self.part_seconds or {}).items():
            values[f"time_share_{part}"] = seconds / self.train_seconds
        for name, value in (self.fleet or {}).items():
            values[f"fleet_{name}"] = value
        return values


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean, None of nothing."""
    return sum(values) / len(values) if values else None
