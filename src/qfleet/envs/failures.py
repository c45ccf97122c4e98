"""Environments that fail: how failures are described and counted, and seeds for the replacements.

Worker processes import this module, so it must not import JAX.
"""

import logging
import traceback
from typing import NamedTuple

import numpy as np

from qfleet.config.errors import RunFailed, message_in
from qfleet.envs.contract import BrokenContract, is_between

logger = logging.getLogger("qfleet")


class Failure(NamedTuple):
    """One environment that failed, or one group of them that failed together."""

    lanes: tuple[int, ...]
    seed: int
    """Last seed of the environment, or of the first one of a group. Episodes since then went on without a new seed."""
    error: str
    """Description of the error, in one line."""

    def __str__(self) -> str:
        lanes = f"lane {self.lanes[0]}" if len(self.lanes) == 1 else f"lanes {self.lanes[0]} to {self.lanes[-1]}"
        return f"in {lanes} (seed {self.seed}): {self.error}"


class TooManyFailures(RunFailed):
    """Environments failed more often than the run survives."""

    def __init__(self, message: str, failure: Failure, num_env_failures: int) -> None:
        super().__init__(message, learner_is_sound=True, num_env_failures=num_env_failures)
        self.failure = failure
        """The last failure."""


class FailureBudget:
    """Counts failures and logs each of them. One more than allowed ends the run."""

    def __init__(self, name: str, max_failures: int) -> None:
        self._name = name
        self._max_failures = max_failures
        self.count = 0

    def spend(self, failure: Failure) -> None:
        """Counts a failure.

        Raises:
          TooManyFailures: if it exceeds the number of failures that the run survives.
        """
        self.count += 1
        if self.count > self._max_failures:
            raise TooManyFailures(
                f"environments may fail at most max_failures={self._max_failures} times, {self._name} failed "
                f"{self.count} times, last {failure}. Fix the environment, or raise max_failures",
                failure,
                self.count,
            )
        logger.warning(
            "environment %s failed %s; replaced (failure %d of %d that the run survives)",
            self._name,
            failure,
            self.count,
            self._max_failures,
        )


def lane_seed(seed: int, lane: int, rebuilds: int = 0) -> int:
    """Returns the seed for the environment of a lane, below 2**31. `rebuilds` says how often it was replaced before."""
    return int(np.random.SeedSequence((seed, lane, rebuilds)).generate_state(1)[0] >> 1)


def describe(error: BaseException) -> str:
    """Returns a description of an exception in one line: its type, its message, and where the user's code raised it.

    A broken contract names that place itself.
    """
    message = " ".join(message_in(error).split())
    if isinstance(error, BrokenContract):
        return message
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not is_between(str(frame.f_globals.get("__name__", "")))
    ]
    where = " ({}:{})".format(*frames[-1]) if frames else ""
    return f"{type(error).__name__}: {message}{where}"
