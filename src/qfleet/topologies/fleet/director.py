"""Who directs the processes of a run on Ray: a thread that asks them for work, hears of it, and replaces what is lost.

What is asked for is bounded, and what comes back is passed on by reference.
"""

import abc
import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from qfleet.config import ConfigError
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.base import StateIsLost
from qfleet.topologies.fleet.cluster import connected, in_words, room
from qfleet.topologies.fleet.supervisor import RemoteProcess, Supervisor, cpus_for

_CHUNK_SECONDS = 0.5
"""What `resume` takes at most: it is how long Ctrl-C waits."""

_WAIT_SECONDS = 0.1
"""For an answer, before anything else is looked at."""

_NOTIFY_SECONDS = 0.01
"""Between two looks of who waits for this thread while it is busy: each costs a switch of threads."""

_LOST_SECONDS = 30.0
"""After which a process that has no place isn't waited for any more, where something else can be done."""

_PATIENCE = 5
"""Times `silence_seconds` that the processes may take to find their places at the start."""


class Tally:
    """What happened since the last record."""

    def __init__(self) -> None:
        self.started_at = time.perf_counter()
        self.seconds = 0.0
        """That it covers."""
        self.end = (0, 0)
        """Environment steps and learner steps in total, then."""


T = TypeVar("T", bound=Tally)


class Director(abc.ABC, Generic[T]):
    """Directs the processes of one run. Public methods are for other threads than its own."""

    _needs_in_words: str
    """What a run can't begin without."""
    _resource_flags: str
    """What to make smaller where there is no room for it."""

    def __init__(self, ray_address: str, silence_seconds: float, max_restarts: int) -> None:
        """Starts nothing yet.

        Args:
          ray_address: of the cluster.
          silence_seconds: after which a process that was asked for something is replaced.
          max_restarts: times that one process may be replaced.
        """
        self._ray_address, self._silence_seconds = ray_address, silence_seconds
        self._supervisor = Supervisor(silence_seconds, max_restarts)
        self.checkpoints_path: Path | None = None
        """Where processes that are replaced find what they were; without it they begin anew."""
        self.env_steps = 0
        """Taken so far, and not lost since."""
        self.learner_steps = 0
        """The same."""
        self._tally = self._new_tally()
        self._requests: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Condition()
        self._is_paused = self._is_new = True
        self._must_end = False
        self._error: BaseException | None = None
        self._stack = contextlib.ExitStack()

    # --- What a topology says of itself ---

    @abc.abstractmethod
    def _new_tally(self) -> T:
        """Returns an empty tally, which begins now."""

    @abc.abstractmethod
    def _resources(self) -> list[Mapping[str, float]]:
        """Returns what the processes will take, but GPUs."""

    @abc.abstractmethod
    def _start_processes(self) -> None:
        """Starts all processes, by `self._make_process` and `self._supervisor.add`; Ray is there."""

    @abc.abstractmethod
    def _missing(self) -> RemoteProcess | None:
        """Returns a process without which the run can't begin, and which isn't there; None if all are."""

    @abc.abstractmethod
    def _vital(self) -> list[RemoteProcess]:
        """Returns the processes that keep what a checkpoint holds."""

    @abc.abstractmethod
    def _issue(self) -> None:
        """Asks for all that may be under way now."""

    @abc.abstractmethod
    def _is_busy(self) -> bool:
        """Returns whether anything is under way to the vital processes."""

    @abc.abstractmethod
    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Has all processes go on from a checkpoint, before the first `resume`; without a replay, from an empty one."""

    # --- For other threads ---

    def start(self) -> None:
        """Starts all processes, and returns when what is needed is there; nothing is learned yet.

        Raises:
          ConfigError: if the cluster isn't there, or has no room for them.
        """
        num_cpus = cpus_for(self._resources())
        inherits = self._stack.enter_context(connected(self._ray_address, num_cpus, "ray_address"))
        self._make_process = functools.partial(RemoteProcess, inherits=inherits)
        self._stack.callback(self._supervisor.end)
        self._start_processes()
        self._thread = threading.Thread(target=self._direct, name="qfleet-director", daemon=True)
        self._thread.start()
        patience = _PATIENCE * self._silence_seconds
        deadline = time.monotonic() + patience
        with self._lock:
            while missing := self._missing():
                self.raise_error()
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"a Ray cluster must have room for {self._needs_in_words}, got none for {missing.name} with "
                        f"{in_words(missing.resources)} in {patience:g} s, {room(missing.resources)}; add nodes, or "
                        f"give smaller {self._resource_flags}"
                    )
                self._lock.wait(_WAIT_SECONDS)

    def close(self) -> None:
        """Ends all processes, and the connection to Ray; may be called twice, and before `start`."""
        if self._thread is not None:
            with self._lock:
                self._must_end = True
            self._thread.join()
            self._thread = None
        self._stack.close()

    def resume(self, until_env_steps: int) -> T:
        """Lets the processes train for half a second, or until so many environment steps; they don't stop then.

        Returns:
          What happened since the last call.
        """
        deadline = time.monotonic() + _CHUNK_SECONDS
        with self._lock:
            if self._is_new:
                self._tally = self._new_tally()
            self._is_paused = self._is_new = False
            while self._error is None and self.env_steps < until_env_steps and time.monotonic() < deadline:
                self._lock.wait(_WAIT_SECONDS)
            self.raise_error()
            tally, self._tally = self._tally, self._new_tally()
            tally.seconds = self._tally.started_at - tally.started_at
            tally.end = (self.env_steps, self.learner_steps)
            return tally

    def quiesce(self) -> None:
        """Returns once nothing is under way to what a checkpoint holds; until `resume`, nothing is stored or learned.

        Raises:
          StateIsLost: if part of it has no place.
        """
        with self._lock:
            self._is_paused = True
            while self._is_busy():
                self.raise_error()
                self._check_have_places(self._vital())
                self._lock.wait(_WAIT_SECONDS)

    @property
    def num_restarts(self) -> int:
        """Processes that were replaced."""
        return self._supervisor.num_restarts

    def raise_error(self) -> None:
        """Raises in this thread what has ended the other."""
        if self._error is not None:
            raise self._error

    def _answer_of(self, process: RemoteProcess, method: str, *, gives_up: bool = False) -> Any:
        """Returns what a process answers, or the one that replaces it meanwhile.

        Raises:
          StateIsLost: if it gives up, for there is neither.
        """
        answer: concurrent.futures.Future = concurrent.futures.Future()

        def ask() -> None:
            self._supervisor.submit(process, method, on_reply=answer.set_result, is_repeated=True)

        self._post(ask)
        while True:
            try:
                return answer.result(_WAIT_SECONDS)
            except TimeoutError:
                self.raise_error()
                if gives_up:
                    self._check_have_places([process])

    def _check_have_places(self, processes: list[RemoteProcess]) -> None:
        for process in processes:
            if not process.is_ready and time.monotonic() - process.started_at > _LOST_SECONDS:
                raise StateIsLost(f"{process.name} is lost, and has no place with {in_words(process.resources)} yet")

    def _post(self, function: Callable[[], None]) -> None:
        """Has the director's thread call a function."""
        with self._lock:
            self._requests.append(function)

    # --- What its own thread does ---

    def _direct(self) -> None:
        notified_at = 0.0
        try:
            while True:
                with self._lock:
                    if self._must_end:
                        return
                    while self._requests:
                        self._requests.popleft()()
                    if not self._is_paused:
                        self._issue()
                self._supervisor.wait(_WAIT_SECONDS)
                with self._lock:
                    self._supervisor.process_replies()
                    if self._is_paused or time.monotonic() - notified_at >= _NOTIFY_SECONDS:
                        notified_at = time.monotonic()
                        self._lock.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = error
                self._lock.notify_all()

    def _of_newest_checkpoint(self, read: Callable[[Checkpoints, int], Any]) -> tuple[Any, dict[str, Any]] | None:
        """Returns what is read of the newest checkpoint, and its counters; None if there is none yet."""
        if self.checkpoints_path is None:
            return None
        checkpoints = Checkpoints(self.checkpoints_path, is_keeper=False)
        while (newest := checkpoints.latest()) is not None:
            try:
                return read(checkpoints, newest), checkpoints.read_metadata(newest)["counters"]
            except Exception:
                if newest in checkpoints.all():
                    raise
                # Else it was deleted meanwhile, for there is a newer one.
        return None
