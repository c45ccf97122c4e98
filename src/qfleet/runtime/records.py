"""The records that a topology yields while it trains."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


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
    seed_return_means: tuple[float | None, ...] | None = None
    """`episode_return_mean` of each seed, `[seeds]`, if there are many in one program."""
    eval_returns: tuple[tuple[float, ...], ...] | None = None
    """Returns of the greedy episodes played after this record, `[seeds][episodes]`, if there were any."""
    eval_num_different: int | None = None
    """How many of these episodes differ from each other, within each seed; the sum over seeds."""
    eval_num_cut: int | None = None
    """How many of them the evaluation has cut short, over all seeds."""
    measures: Mapping[str, float] | None = None
    """What was measured beside that evaluation, by name; see `qfleet.training.measuring`."""

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
            "seed_return_means",
            "part_seconds",
            "fleet",
            "measures",
        ):
            del values[name]
        values["env_steps_per_second"] = self.new_env_steps / self.train_seconds
        values["learner_steps_per_second"] = self.new_learner_steps / self.train_seconds
        for i, value in enumerate(self.seed_return_means or ()):
            values[f"episode_return_mean_seed_{i}"] = value
        values["eval_return_mean"] = self.eval_return_mean
        if self.eval_returns is not None and len(self.eval_returns) > 1:
            for i, returns in enumerate(self.eval_returns):
                values[f"eval_return_mean_seed_{i}"] = mean(returns)
        for part, seconds in (self.part_seconds or {}).items():
            values[f"time_share_{part}"] = seconds / self.train_seconds
        for name, value in (self.fleet or {}).items():
            values[f"fleet_{name}"] = value
        return values | dict(self.measures or {})


def progress_from(message: Mapping[str, Any]) -> Progress:
    """Returns the progress that another process reported, as it was read from JSON: its fields, and maybe a `kind`."""
    fields = {name: value for name, value in message.items() if name != "kind"}
    if fields["eval_returns"] is not None:
        fields["eval_returns"] = tuple(map(tuple, fields["eval_returns"]))
    if fields["seed_return_means"] is not None:
        fields["seed_return_means"] = tuple(fields["seed_return_means"])
    return Progress(**fields)


class Sum(NamedTuple):
    """Values added up, and how many they are."""

    total: float = 0.0
    num_values: int = 0

    @property
    def mean(self) -> float | None:
        """The mean of the values, None if there are none."""
        return self.total / self.num_values if self.num_values else None


def sum_of(values: Sequence[float]) -> Sum:
    """Returns the sum of values."""
    return Sum(sum(values), len(values))


def weighted_sum(means: Sequence[float | None], counts: Sequence[int]) -> Sum:
    """Returns the sum of values that are known by the means of groups; the mean of an empty group may be None."""
    total = sum((group_mean or 0.0) * count for group_mean, count in zip(means, counts, strict=True))
    return Sum(total, sum(counts))


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean of values, None if there are none."""
    return sum_of(values).mean


def make_progress(
    *,
    env_steps: int,
    learner_steps: int,
    train_seconds: float,
    new_env_steps: int,
    new_learner_steps: int,
    episode_return: Sum,
    episode_length: Sum,
    q_max: Sum,
    loss: Sum,
    td_error: Sum,
    exploration: float,
    staleness: Sum = Sum(),  # noqa: B008, an immutable value
    num_env_failures: int = 0,
    part_seconds: Mapping[str, float] | None = None,
    fleet: Mapping[str, float] | None = None,
) -> Progress:
    """Returns the record of one chunk from what its steps add up to.

    Args:
      env_steps: as in `Progress`, like every argument that isn't named below.
      episode_return: the returns of the episodes that ended, over all seeds.
      episode_length: their lengths, in environment steps.
      q_max: the greatest value of each observation acted on, or their mean in each row.
      loss: the loss of each learner step; only the steps whose loss is known by now.
      td_error: the mean absolute TD error of the same steps.
      staleness: learner steps between the parameters that acted and the newest, in each row.
    """
    return Progress(
        env_steps=env_steps,
        learner_steps=learner_steps,
        train_seconds=train_seconds,
        new_env_steps=new_env_steps,
        new_learner_steps=new_learner_steps,
        num_episodes=episode_return.num_values,
        episode_return_mean=episode_return.mean,
        episode_length_mean=episode_length.mean,
        q_mean=q_max.mean or 0.0,
        loss=loss.mean,
        td_error_mean=td_error.mean,
        exploration=exploration,
        staleness=staleness.mean or 0.0,
        num_env_failures=num_env_failures,
        part_seconds=part_seconds,
        fleet=fleet,
    )
