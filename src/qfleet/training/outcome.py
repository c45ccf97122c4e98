"""What a run notes down about itself on its way, what it does at its end, and what it says of an error."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qfleet.config import ConfigError, RunFailed
from qfleet.envs.failures import describe
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import strict_json

logger = logging.getLogger("qfleet")

LEAST_FALL = 0.1
"""Share of the best mean return that the last one must lie below it to be worth a warning."""

_DIVERGED = 1e4
"""Multiple of what the returns can explain, from which on Q-values or TD errors count as diverged."""

_DIVERGED_BLINDLY = 1e8
"""The same while no episode has ended, so that nothing is known about the size of rewards."""


class Evaluations:
    """The newest evaluation of a run and the best one, which a checkpoint keeps."""

    def __init__(self) -> None:
        self.at: int | None = None
        """Environment steps of the newest one; None before the first."""
        self.returns: list[list[float]] | None = None
        """Its returns, `[num_seeds][episodes]`."""
        self.best_at: int | None = None
        self.best_mean: float | None = None
        self._best_error = 0.0  # standard error of the best mean

    def add(self, env_steps: int, returns: np.ndarray) -> None:
        """Notes an evaluation, `[num_seeds, episodes]`. One without episodes doesn't replace an earlier one."""
        if not returns.size:
            return
        self.at, self.returns = env_steps, returns.tolist()
        mean = float(np.mean(returns))
        if self.best_mean is None or mean > self.best_mean:
            self.best_at, self.best_mean, self._best_error = env_steps, mean, _standard_error(returns)

    @property
    def mean(self) -> float | None:
        """Mean return of the newest evaluation, over all seeds."""
        return None if self.returns is None else float(np.mean(np.array(self.returns, float)))

    def fall(self) -> str | None:
        """Returns a sentence if the newest mean return is well below the best one, beyond what chance explains."""
        if self.best_mean is None or self.mean is None or self.best_at == self.at:
            return None
        fall, error = (
            self.best_mean - self.mean,
            math.hypot(self._best_error, _standard_error(np.array(self.returns, float))),
        )
        if not fall > max(LEAST_FALL * abs(self.best_mean), 2 * error):
            return None
        return (
            f"the last evaluation has a mean return of {self.mean:.1f}, well below the best one, {self.best_mean:.1f} "
            f"at environment step {self.best_at:,}"
        )

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as strict JSON can hold it."""
        names = ("at", "returns", "best_at", "best_mean")
        saved = {name: getattr(self, name) for name in names} | {"best_error": self._best_error}
        content: dict[str, Any] = json.loads(strict_json(saved))
        return content

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `saved` returned."""
        self.at, self.returns = saved["at"], saved["returns"]
        self.best_at, self.best_mean, self._best_error = saved["best_at"], saved["best_mean"], saved["best_error"]

    def summary(self) -> dict[str, Any]:
        """Returns the entries of a run's summary."""
        return {
            "eval_at_env_steps": self.at,
            "eval_return_mean": self.mean,
            "eval_returns": self.returns,
            "best_eval_at_env_steps": self.best_at,
            "best_eval_return_mean": self.best_mean,
        }


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
    return isinstance(error, OSError) and error.errno is None


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
    saved = "there is no checkpoint" if checkpoint is None else f"the newest checkpoint is {checkpoint}"
    return (
        f"the run failed by environment step {env_steps}: {describe(error)}; {saved}. Once the cause is mended, "
        f"`qfleet resume {path}` goes on"
    )


def _standard_error(returns: np.ndarray) -> float:
    return float(np.std(returns) / math.sqrt(returns.size))
