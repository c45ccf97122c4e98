"""Base class of directors, which coordinate the processes of a run on Ray.

A director has a thread that requests work from the processes, handles their replies, and replaces lost processes. The
work under way is bounded. Large arrays don't pass through the director: it hands on references to them.
"""

import abc
import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from qfleet.config import ConfigError
from qfleet.config.node_labels import node_labels
from qfleet.config.ray_topologies import RayTopologyConfig
from qfleet.runtime.checkpoint_files import NotSaved
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.base import StateIsLost
from qfleet.topologies.fleet.calls import Inbox, ValueIsLost
from qfleet.topologies.fleet.cluster import check_can_choose_nodes, connected, is_local, room
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import RemoteProcess, cpus_for
from qfleet.topologies.fleet.stats import DirectorStats
from qfleet.topologies.fleet.supervisor import Supervisor, carrier_of

_RESUME_SECONDS = 0.5
"""Longest time that `resume` takes, and so the longest time that Ctrl-C waits."""

_WAIT_SECONDS = 0.1
"""Longest wait for a reply, before the thread looks for anything else to do."""

_NOTIFY_SECONDS = 0.01
"""Time between two notifications of threads that wait for a busy director: each costs a switch of threads."""

_LOST_SECONDS = 30.0
"""Time after which a process that has found no node is no longer waited for, if the caller can do without it."""

_PATIENCE = 5
"""Multiple of `silence_seconds` that the processes may take at the start to find their nodes."""


P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S", bound=DirectorStats)


class Director(abc.ABC, Generic[S]):
    """Coordinates the processes of one run. Public methods are called by other threads than the director's own."""

    _needs_in_words: str
    """The processes without which a run can't begin, for an error message."""
    _resource_flags: str
    """The flags to make smaller if there is no room for these processes."""

    def __init__(self, topology: RayTopologyConfig) -> None:
        """Starts nothing yet.

        Args:
          topology: of the run: the cluster, and when a process is replaced.
        """
        self._ray_address, self._silence_seconds = topology.ray_address, topology.silence_seconds
        self._labels = node_labels(topology)
        self._supervisor = Supervisor(topology.silence_seconds, topology.max_restarts)
        self.checkpoints_path: Path | None = None
        """Folder of the checkpoints from which replaced processes go on; None makes them begin anew."""
        self._stats, self._counting_since = self._new_stats(), time.perf_counter()
        self._requests: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Condition()
        self._is_paused = self._is_new = True
        self._must_terminate = False
        self._error: BaseException | None = None
        self._stack = contextlib.ExitStack()

    # --- What each topology implements ---

    @property
    @abc.abstractmethod
    def env_steps(self) -> int:
        """Environment steps taken so far, without those that were lost since."""

    @property
    @abc.abstractmethod
    def learner_steps(self) -> int:
        """Learner steps taken so far, without those that were lost since."""

    @abc.abstractmethod
    def _new_stats(self) -> S:
        """Returns empty stats of a period that begins now."""

    @abc.abstractmethod
    def _resources(self) -> list[Mapping[str, float]]:
        """Returns the resources that each process will take, GPUs aside."""

    @abc.abstractmethod
    def _start_processes(self) -> None:
        """Starts all processes, by `self._make_process` and `self._supervisor.add`. Ray is connected."""

    @abc.abstractmethod
    def _missing(self) -> RemoteProcess | None:
        """Returns a process that isn't ready and without which the run can't begin; None if there is none."""

    @abc.abstractmethod
    def _vital(self) -> list[RemoteProcess]:
        """Returns the processes that keep the state that a checkpoint holds."""

    @abc.abstractmethod
    def _issue(self) -> None:
        """Submits all requests that are due."""

    @abc.abstractmethod
    def _is_busy(self) -> bool:
        """Returns whether anything is on its way to the vital processes."""

    @property
    @abc.abstractmethod
    def counters(self) -> dict[str, Any]:
        """The counts that `restore` needs in addition to the state and to the numbers of steps."""

    @abc.abstractmethod
    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Makes all processes go on from a checkpoint, before the first `resume`.

        If the checkpoint has no replay, they go on from an empty one.
        """

    # --- For other threads ---

    def start(self) -> None:
        """Starts all processes, and returns when those are ready that the run needs. Nothing is learned yet.

        Raises:
          ConfigError: if the cluster can't be reached, or has no room for the processes.
        """
        num_cpus = cpus_for(self._resources())
        inherits = self._stack.enter_context(connected(self._ray_address, num_cpus, "ray_address"))
        check_can_choose_nodes(self._labels)
        self._make_process = functools.partial(RemoteProcess, inherits=inherits)
        inbox = Inbox()
        self._supervisor.open(inbox, carrier_of(inbox, is_one_machine=is_local()))
        self._stack.callback(self._supervisor.terminate)
        self._start_processes()
        self._thread = threading.Thread(target=self._direct, name="qfleet-director", daemon=True)
        self._thread.start()
        patience = _PATIENCE * self._silence_seconds
        with self._lock:
            while missing := self._missing():
                self.raise_error()
                # Since this process was started, which may be in the place of one that had a node, and was lost.
                if missing.place is None and self._supervisor.clock() - missing.started_at > patience:
                    raise ConfigError(
                        f"a Ray cluster must have room for {self._needs_in_words}, got none for {missing.name} with "
                        f"{missing.wants} in {patience:g} s, {room(missing.resources, missing.labels)}; add nodes, or "
                        f"give smaller values for {self._resource_flags}{', or other labels' if missing.labels else ''}"
                    )
                self._lock.wait(_WAIT_SECONDS)

    def terminate(self) -> None:
        """Terminates all processes and closes the connection to Ray; may be called twice, and before `start`."""
        if self._thread is not None:
            with self._lock:
                self._must_terminate = True
            self._thread.join()
            self._thread = None
        self._stack.close()

    def resume(self, until_env_steps: int) -> S:
        """Lets the processes train, and returns after half a second or after so many environment steps.

        The processes don't stop when it returns.

        Returns:
          What happened since the last call.
        """
        deadline = time.monotonic() + _RESUME_SECONDS
        with self._lock:
            if self._is_new:
                self._take_stats()
            self._is_paused = self._is_new = False
            while self._error is None and self.env_steps < until_env_steps and time.monotonic() < deadline:
                self._lock.wait(_WAIT_SECONDS)
            self.raise_error()
            return self._take_stats()

    def quiesce(self) -> None:
        """Waits until nothing is under way that would change what a checkpoint holds.

        Nothing is stored or learned afterwards until `resume` is called.

        Raises:
          StateIsLost: if a process that holds part of the state is lost and has no node.
        """
        with self._lock:
            self._is_paused = True
            while self._is_busy():
                self.raise_error()
                self._check_have_places(self._vital())
                self._lock.wait(_WAIT_SECONDS)

    @property
    def num_restarts(self) -> int:
        """Number of processes that were replaced."""
        return self._supervisor.num_restarts

    def raise_error(self) -> None:
        """Raises in this thread the error that has ended the director's thread."""
        if self._error is not None:
            raise self._error

    def _answer_of(
        self, process: RemoteProcess[P], method: Callable[[P], R], *, num_references: int = 0, gives_up: bool = False
    ) -> R:
        """Calls a method in a process, and returns its reply. If the process is replaced, the replacement replies.

        Args:
          process: to call.
          method: of its class.
          num_references: number of references in the reply.
          gives_up: whether to stop waiting when the process is lost and its replacement finds no node.

        Raises:
          StateIsLost: if it gives up.
        """
        reply: concurrent.futures.Future[R] = concurrent.futures.Future()

        def ask() -> None:
            results = [Reference[Any]() for _ in range(num_references)]
            self._supervisor.submit(process, method, on_reply=reply.set_result, results=results, is_repeated=True)

        self._post(ask)
        return self._wait_for(reply, [process] if gives_up else [])

    def _wait_for(self, answer: concurrent.futures.Future[R], processes: Sequence[RemoteProcess]) -> R:
        """Returns the result of a future that the director's thread sets.

        Args:
          answer: the future.
          processes: that must have a node meanwhile.

        Raises:
          StateIsLost: if one of them is lost, and its replacement finds no node.
        """
        while True:
            try:
                return answer.result(_WAIT_SECONDS)
            except TimeoutError:
                self.raise_error()
                self._check_have_places(processes)

    def _take_stats(self) -> S:
        """Returns what happened since the last call, and begins to count anew."""
        stats, since, now = self._stats, self._counting_since, time.perf_counter()
        self._stats, self._counting_since = self._new_stats(), now
        stats.seconds, stats.end = now - since, (self.env_steps, self.learner_steps)
        return stats

    def _value_of(self, process: RemoteProcess[P], method: Callable[[P], Reference[R]], *, gives_up: bool = False) -> R:
        """Returns a copy of the value that a method of a process returns a reference to. As `_answer_of` otherwise."""
        while True:
            with contextlib.suppress(ValueIsLost):  # with its node, after the process had replied
                return self._supervisor.value(self._answer_of(process, method, num_references=1, gives_up=gives_up))

    def _check_have_places(self, processes: Sequence[RemoteProcess]) -> None:
        for process in processes:
            if process.place is None and self._supervisor.clock() - process.started_at > _LOST_SECONDS:
                raise StateIsLost(f"{process.name} is lost, and found no node with {process.wants} yet")

    def _post(self, function: Callable[[], None]) -> None:
        """Makes the director's thread call a function."""
        with self._lock:
            self._requests.append(function)
        self._supervisor.wake()

    # --- What its own thread does ---

    def _direct(self) -> None:
        notified_at = 0.0
        try:
            while True:
                with self._lock:
                    if self._must_terminate:
                        return
                    self._ask()
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

    def _ask(self) -> None:
        """Does what other threads have asked for, and submits all requests that are due."""
        while self._requests:
            self._requests.popleft()()
        if not self._is_paused:
            self._issue()

    def _of_newest_checkpoint(self, read: Callable[[Checkpoints, int], Any]) -> tuple[Any, dict[str, Any]] | None:
        """Returns what `read` reads of the newest checkpoint, and its counters; None if there is none or lacks it."""
        if self.checkpoints_path is None:
            return None
        checkpoints = Checkpoints(self.checkpoints_path, run_id=None, is_keeper=False)
        while (newest := checkpoints.latest()) is not None:
            try:
                return read(checkpoints, newest), checkpoints.read_metadata(newest)["counters"]
            except NotSaved:
                return None
            except Exception:
                if newest in checkpoints.all():
                    raise
                # It was deleted meanwhile, because there is a newer one: read that one.
        return None
