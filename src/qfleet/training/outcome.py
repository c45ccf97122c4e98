"""What a run notes about itself as it goes, what it does at its end, and the message of an error that ends it."""

import contextlib
import json
import logging
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qfleet.config import ConfigError, RunFailed
from qfleet.envs.failures import describe
from qfleet.runtime.checkpoints import CheckpointWriteError
from qfleet.runtime.devices import lack_of_memory
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import strict_json

logger = logging.getLogger("qfleet")

LEAST_FALL = 0.1
"""Share of the best mean return that the last one must lie below it to be worth a warning."""

_DIVERGED = 1e4
"""Multiple of what the returns can explain, from which on Q-values or TD errors count as diverged."""

_DIVERGED_BLINDLY = 1e8
"""The same while no episode has ended, so that nothing is known about the size of rewards."""


class Evaluation(NamedTuple):
    """One evaluation, as a run remembers it."""

    env_steps: int
    mean: float
    error: float
    """Standard error of the mean."""


def evaluation_of(env_steps: int, returns: np.ndarray) -> Evaluation:
    """Returns the evaluation at `env_steps` with these returns, `[num_seeds, episodes]`, at least one."""
    return Evaluation(env_steps, float(np.mean(returns)), float(np.std(returns) / math.sqrt(returns.size)))


class Evaluations:
    """The newest evaluation of a run, and the best one.

    The best of many noisy means overestimates: of 20 evaluations of one and the same policy, one is lucky. So an
    evaluation that is better than the best one is only a candidate. Fresh episodes of the same parameters decide, and
    it is their mean that counts from then on. Chance must favour a policy twice to displace a better one.

    Several seeds count as one learner, with the mean over all of their episodes.
    """

    def __init__(self) -> None:
        self.newest: Evaluation | None = None
        self.best: Evaluation | None = None

    def is_better(self, evaluation: Evaluation) -> bool:
        """Returns whether an evaluation is better than the best one."""
        return math.isfinite(evaluation.mean) and (self.best is None or evaluation.mean > self.best.mean)

    def fall(self) -> str | None:
        """Returns a sentence if the newest mean return is well below the best one, beyond what chance explains."""
        if self.best is None or self.newest is None:
            return None
        fall, error = self.best.mean - self.newest.mean, math.hypot(self.best.error, self.newest.error)
        if not fall > max(LEAST_FALL * abs(self.best.mean), 2 * error):
            return None
        return (
            f"the last evaluation has a mean return of {self.newest.mean:.1f}, well below the best one, "
            f"{self.best.mean:.1f} at environment step {self.best.env_steps:,}"
        )

    def saved(self) -> Any:
        """Returns what a checkpoint keeps, as strict JSON can hold it."""
        return json.loads(strict_json([self.best, self.newest]))

    def restore(self, saved: Any) -> None:
        """Goes on from what `saved` returned, if there is anything."""
        if saved is not None:
            self.best, self.newest = map(_restored, saved)

    def summary(self) -> dict[str, Any]:
        """Returns the entries of a run's summary."""
        return {
            "best_eval_at_env_steps": self.best and self.best.env_steps,
            "best_eval_return_mean": self.best and self.best.mean,
        }


def _restored(saved: list[Any] | None) -> Evaluation | None:
    """Returns an evaluation from strict JSON, which has null in place of numbers that aren't finite."""
    if saved is None:
        return None
    env_steps, *numbers = saved
    return Evaluation(env_steps, *(math.nan if number is None else number for number in numbers))


class DivergenceCheck:
    """Compares Q-values and TD errors with what returns and discount can explain."""

    def __init__(self, discount: float) -> None:
        self._horizon = 1 / (1 - discount) if discount < 1 else 1e4
        self._most_return: float | None = None  # greatest mean return of a record, as an absolute value

    def check(self, progress: Progress) -> str | None:
        """Returns a sentence if the values of this record have left all bounds."""
        for each in (progress.episode_return_mean, progress.eval_return_mean):
            if each is not None and math.isfinite(each):
                self._most_return = max(self._most_return or 0.0, abs(each))
        times = _DIVERGED_BLINDLY if self._most_return is None else _DIVERGED
        bound = times * self._horizon * max(1.0, self._most_return or 0.0)
        largest = max(abs(progress.q_mean), progress.td_error_mean or 0.0)
        if not largest > bound:
            return None
        return (
            f"the values have diverged by environment step {progress.env_steps:,}: they reach {largest:.1e}, which no "
            f"return explains; try a lower learning_rate, a smaller max_gradient_norm or a slower target network"
        )


class Speed:
    """Steady-state speed of training. Evaluations don't count, nor does the first chunk, which warms caches up."""

    def __init__(self) -> None:
        self.env_steps = 0
        self.learner_steps = 0
        self._seconds = 0.0
        self._is_first = True

    def add(self, progress: Progress) -> None:
        """Adds a record."""
        if not self._is_first:
            self.env_steps += progress.new_env_steps
            self.learner_steps += progress.new_learner_steps
            self._seconds += progress.train_seconds
        self._is_first = False

    def per_second(self, count: int) -> float | None:
        """Returns a count of these steps as a rate; None if there is none yet."""
        return count / self._seconds if self._seconds else None


class Closing(contextlib.ExitStack):
    """Context manager that does what is due at the end of a run, newest first. If a part fails, the rest is done."""

    def add(self, close: Callable[[], Any]) -> None:
        """Adds a part. If it fails, that is logged."""

        def close_anyway() -> None:
            try:
                close()
            except Exception as error:
                logger.warning("the end of a run failed in part: %s", describe(error))

        self.callback(close_anyway)


def is_of_checkpoints(error: BaseException) -> bool:
    """Returns whether an error says that a checkpoint couldn't be written."""
    return isinstance(error, CheckpointWriteError)


def message_of(error: BaseException, env_steps: int, checkpoint: int | None, path: Path) -> str:
    """Returns in one line what ended a run, and how it can go on. Errors of qfleet itself say so already.

    Args:
      error: what was raised.
      env_steps: environment steps of the run by then.
      checkpoint: environment steps of the newest checkpoint.
      path: the run's folder.
    """
    if is_of_checkpoints(error) or isinstance(error, (ConfigError, RunFailed)):
        return str(error)
    if lack := lack_of_memory(error):
        return lack
    saved = "there is no checkpoint" if checkpoint is None else f"the newest checkpoint is {checkpoint}"
    return (
        f"the run failed by environment step {env_steps}: {describe(error)}; {saved}. Once the cause is mended, "
        f"`qfleet resume {shlex.quote(str(path))}` goes on"
    )
