"""The records that a topology yields while it trains."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """One record of progress: what happened since the previous one.

    Means are over lanes and seeds. A mean of nothing is None.
    """

    env_steps: int
    """Environment steps so far, over all lanes of one seed."""
    learner_steps: int
    """Learner steps so far, of one seed."""
    train_seconds: float
    """Wall time since the previous record, without evaluation."""
    new_env_steps: int
    """Environment steps since the previous record, over all lanes of one seed."""
    new_learner_steps: int
    """Learner steps since the previous record, of one seed."""
    num_episodes: int
    """Training episodes that ended, over all seeds."""
    episode_return_mean: float | None
    """Mean undiscounted return of these episodes, which explore."""
    episode_length_mean: float | None
    """Mean length of these episodes, in environment steps."""
    q_mean: float
    """Mean of the greatest Q-value at each observation acted on, in units of discounted reward."""
    loss: float | None
    """Mean loss of the batches."""
    td_error_mean: float | None
    """Mean absolute TD error of the batches, in units of discounted reward."""
    exploration: float
    """Epsilon or temperature in the last row."""
    staleness: float = 0.0
    """Learner steps between the parameters that acted and the newest ones, mean over rows."""
    num_env_failures: int = 0
    """Environments that raised, hung or died, and were replaced."""
    part_seconds: Mapping[str, float] | None = None
    """`train_seconds` by the part of a training step that took them, if the run measures that."""
    fleet: Mapping[str, float] | None = None
    """Statistics of the fleet's processes, if the topology has a fleet."""
    eval_returns: tuple[tuple[float, ...], ...] | None = None
    """Returns of the greedy episodes played after this record, `[seeds][episodes]`, if there were any."""

    @property
    def eval_return_mean(self) -> float | None:
        """Mean return of the greedy episodes of all seeds."""
        if self.eval_returns is None:
            return None
        return sum(map(sum, self.eval_returns)) / sum(map(len, self.eval_returns))

    def metrics(self) -> dict[str, float | None]:
        """Returns the numbers that a log keeps, by name."""
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
    """Returns the mean, or None if there are no values."""
    return sum(values) / len(values) if values else None
