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


class BestEvaluation:
    """The best evaluation of a run, beside the newest one. A checkpoint keeps both."""

    def __init__(self) -> None:
        self._best: _Evaluation | None = None
        self._newest: _Evaluation | None = None

    def add(self, env_steps: int, returns: np.ndarray) -> None:
        """Notes the evaluation at `env_steps`, with at least one return, `[num_seeds, episodes]`."""
        error = float(np.std(returns) / math.sqrt(returns.size))
        self._newest = _Evaluation(env_steps, float(np.mean(returns)), error)
        if math.isfinite(self._newest.mean) and (self._best is None or self._newest.mean > self._best.mean):
            self._best = self._newest

    def fall(self) -> str | None:
        """Returns a sentence if the newest mean return is well below the best one, beyond what chance explains."""
        if self._best is None or self._newest is None:
            return None
        fall, error = self._best.mean - self._newest.mean, math.hypot(self._best.error, self._newest.error)
        if not fall > max(LEAST_FALL * abs(self._best.mean), 2 * error):
            return None
        return (
            f"the last evaluation has a mean return of {self._newest.mean:.1f}, well below the best one, "
            f"{self._best.mean:.1f} at environment step {self._best.env_steps:,}"
        )

    def saved(self) -> Any:
        """Returns what a checkpoint keeps, as strict JSON can hold it."""
        return json.loads(strict_json([self._best, self._newest]))

    def restore(self, saved: Any) -> None:
        """Goes on from what `saved` returned, if there is anything."""
        if saved is not None:
            self._best, self._newest = map(_restored, saved)

    def summary(self) -> dict[str, Any]:
        """Returns the entries of a run's summary."""
        return {
            "best_eval_at_env_steps": self._best and self._best.env_steps,
            "best_eval_return_mean": self._best and self._best.mean,
        }


class _Evaluation(NamedTuple):
    """One evaluation."""

    env_steps: int
    mean: float
    error: float
    """Standard error of the mean."""


def _restored(saved: list[Any] | None) -> _Evaluation | None:
    """Returns an evaluation from strict JSON, which has null in place of numbers that aren't finite."""
    if saved is None:
        return None
    env_steps, *numbers = saved
    return _Evaluation(env_steps, *(math.nan if number is None else number for number in numbers))


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
