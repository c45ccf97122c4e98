"""Limits of a policy's server, and how fast it may be asked."""

import dataclasses
import time
from collections.abc import Callable

from qfleet.config.checks import MAX_SECONDS, MAX_SIZE, check, check_count, check_positive
from qfleet.config.values import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingLimits(Config):
    """What a policy's server accepts, and how long it waits."""

    max_batch: int = 256
    """Most observations that the policy sees at once, and most in one request."""
    max_delay_seconds: float = 0.001
    """Longest time that an observation waits for others to join its batch."""
    max_waiting: int = 4096
    """Most observations that may wait for their turn. Further requests are told to come back."""
    max_request_bytes: int = 16_000_000
    """Largest request."""
    max_observations_per_second: float | None = None
    """Most observations per second, over all requests; None for no limit."""
    max_sessions: int = 1024
    """Most episodes whose memory is kept, of a policy that remembers something."""
    session_seconds: float = 600.0
    """Time without an observation after which a session makes room for another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_batch", self.max_batch, maximum=2**16)
        check_count("max_waiting", self.max_waiting, minimum=self.max_batch, maximum=MAX_SIZE)
        check_count("max_request_bytes", self.max_request_bytes, maximum=MAX_SIZE)
        check_count("max_sessions", self.max_sessions, maximum=2**20)
        check(
            0 <= self.max_delay_seconds <= MAX_SECONDS,
            "max_delay_seconds",
            f"from 0 to {MAX_SECONDS:g}",
            self.max_delay_seconds,
        )
        check_positive(self, "session_seconds", maximum=MAX_SECONDS)
        if self.max_observations_per_second is not None:
            check_positive(self, "max_observations_per_second", maximum=1e12)


class Rate:
    """Says whether observations come too fast: a bucket of tokens that holds as many as one second brings."""

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with a full bucket; `per_second` None is no limit, and `clock` returns the time in seconds."""
        self._per_second, self._clock = per_second, clock
        self._left, self._since = per_second or 0.0, clock()

    def take(self, count: int) -> float:
        """Takes tokens if there are any left, and returns the seconds to wait otherwise; 0 if it took them.

        More tokens may be taken than are left, so that a request may have more observations than one second brings.
        """
        if self._per_second is None:
            return 0.0
        now = self._clock()
        self._left = min(self._per_second, self._left + (now - self._since) * self._per_second)
        self._since = now
        if self._left <= 0:
            return -self._left / self._per_second or 1 / self._per_second
        self._left -= count
        return 0.0
