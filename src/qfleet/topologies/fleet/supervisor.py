"""Supervises the processes of a run on Ray: starts them, passes on requests and replies, and replaces lost ones."""

import collections
import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from qfleet.config import RunFailed
from qfleet.runtime.devices import compute_in_line, use_cpu_only
from qfleet.topologies.fleet.cluster import in_words, last_line, variables

logger = logging.getLogger("qfleet")

_FORGOTTEN_SECONDS = 600.0
"""Time after which the failure of a process no longer counts against it."""

_SLOW_STARTS = 5
"""Factor of `silence_seconds` for the first request of each method, because the process compiles then."""

_LOOK_SECONDS = 1.0
"""Time between two checks for silent processes."""


class InRemoteProcess:
    """Base class of everything that runs in a remote process, in front of the class that does the work.

    It prepares the process before that class uses JAX: `class RemoteActor(InRemoteProcess, Actor)`.
    """

    def __init__(self, variables: Mapping[str, str], *arguments: Any) -> None:
        """Sets up the process, in which JAX must not have been used yet.

        Args:
          variables: environment variables to set first, because Ray may have started the process in advance.
          *arguments: of the class that does the work.
        """
        os.environ.pop("OMP_NUM_THREADS", None)  # set by Ray to the number of CPUs that the process takes
        os.environ.update(variables)
        if variables.get("JAX_PLATFORMS") == "cpu":
            use_cpu_only()
        if variables.get("JAX_CPU_ENABLE_ASYNC_DISPATCH") == "false":
            compute_in_line()
        super().__init__(*arguments)

    def where(self) -> tuple[int, str]:
        """Returns process ID and node ID. The reply also says that the constructor has finished."""
        return os.getpid(), ray.get_runtime_context().get_node_id()


@dataclasses.dataclass
class _Request:
    """A method call that a process has not replied to yet."""

    method: str
    references: list[Any]
    """References to the values that the method returns. `on_reply` gets the first value, and the other references."""
    on_reply: Callable[..., None]
    needs: list[Any]
    """References among its arguments."""
    arguments: tuple | None
    """Arguments to repeat the request with if the process is replaced; None to drop the request then."""
    on_dropped: Callable[[], None]
    since: float
    """Time of the request."""


class RemoteProcess:
    """A place in the run, and the process that holds it at the moment."""

    def __init__(
        self,
        name: str,
        kind: type,
        arguments: tuple,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
        on_lost: Callable[[], None],
        *,
        inherits: bool = False,
    ) -> None:
        """Describes the process; `start` starts it.

        Args:
          name: for messages.
          kind: class of the object that runs in the process.
          arguments: of its constructor.
          resources: that the process takes, by Ray's names.
          environment: environment variables to set in the process.
          on_lost: called when the process has been replaced, before the replacement gets its first request.
          inherits: whether Ray's processes inherit `variables` from this one. If not, Ray must set them, and takes
            twice as long to start a process.
        """
        amounts = dict(resources)
        options: dict[str, Any] = {
            "num_cpus": amounts.pop("CPU", 0),
            "num_gpus": amounts.pop("GPU", 0),
            "resources": amounts,
        }
        if not inherits:
            options["runtime_env"] = {"env_vars": variables()}
        self.name, self.resources = name, dict(resources)
        self._make: Any = ray.remote(kind).options(**options)
        self._arguments, self.on_lost = (dict(environment), *arguments), on_lost
        self.requests: collections.deque[_Request] = collections.deque()
        self.has_replied_to: set[str] = set()
        """Methods that the current process has replied to, and so has compiled."""
        self.replied_at = self.started_at = 0.0
        """Time of the last reply, or of the last moment when no reply could have arrived."""
        self.place: tuple[int, str] | None = None
        """Process ID and node ID; None until the process has been made."""
        self.failed_at: collections.deque[float] = collections.deque()
        """Times of the failures that still count."""
        self.handle: Any = None

    @property
    def is_ready(self) -> bool:
        """Whether the process has a node and its constructor has finished."""
        return self.place is not None

    def start(self) -> None:
        """Makes Ray start a process in this place."""
        self.place, self.has_replied_to = None, set()
        self.started_at = self.replied_at = time.monotonic()
        self.handle = self._make.remote(*self._arguments)

    def terminate(self, *, is_alive: bool = False) -> None:
        """Terminates the process.

        Args:
          is_alive: whether the process may still be at work, or be stopped so that it doesn't hear Ray. If it is on
            this node, it is then killed by a signal.
        """
        if self.handle is None:
            return
        ray.kill(self.handle)
        if is_alive and self.place is not None and self.place[1] == ray.get_runtime_context().get_node_id():
            try:
                os.kill(self.place[0], signal.SIGKILL)
            except ProcessLookupError:
                self.place = None
        self.handle = None


class Supervisor:
    """All processes of one run. Only one thread may use it."""

    def __init__(self, silence_seconds: float, max_restarts: int) -> None:
        self._silence_seconds, self._max_restarts = silence_seconds, max_restarts
        self._processes: list[RemoteProcess] = []
        self._done: set[Any] = set()
        self._looked_at = time.monotonic()
        self.num_restarts = 0

    def add(self, process: RemoteProcess) -> RemoteProcess:
        """Starts a process and returns it."""
        self._processes.append(process)
        self._start(process)
        return process

    def submit(
        self,
        process: RemoteProcess,
        method: str,
        *arguments: Any,
        on_reply: Callable[..., None] = lambda *_: None,
        num_returns: int = 1,
        needs: tuple[Any, ...] = (),
        is_repeated: bool = False,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Calls a method in a process, and returns references to the values that the method will return.

        A process carries out its requests in order, and `on_reply` is called in the same order.

        Args:
          process: that carries out the request.
          method: name of a method of its class.
          *arguments: of the method. Ray replaces references among them by the values that they refer to.
          on_reply: called with the first value that the method returns, and references to the other values.
          num_returns: number of values that the method returns.
          needs: references among the arguments. If one of their values is lost, the request fails through no fault of
            the process.
          is_repeated: whether to repeat the request if the process is replaced.
          on_dropped: called instead of `on_reply` if there will be no reply.
        """
        references = getattr(process.handle, method).options(num_returns=num_returns).remote(*arguments)
        references = references if num_returns > 1 else [references]
        kept = arguments if is_repeated else None
        process.requests.append(_Request(method, references, on_reply, list(needs), kept, on_dropped, time.monotonic()))
        return references

    def wait(self, seconds: float) -> None:
        """Waits for a reply, for at most so many seconds."""
        waiting = [
            request.references[0]
            for process in self._processes
            for request in process.requests
            if request.references[0] not in self._done
        ]
        if waiting:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
            if not ready:
                ready, _ = ray.wait(waiting, timeout=seconds, fetch_local=False)
            self._done.update(ready)
        else:
            time.sleep(seconds)

    def process_replies(self) -> None:
        """Processes all replies that have arrived, and replaces processes that have failed.

        Raises:
          RunFailed: if a process has failed too often.
        """
        for process in self._processes:
            while process.requests and process.requests[0].references[0] in self._done:
                self._process_reply(process, process.requests.popleft())
        self._look_for_silence()

    def _process_reply(self, process: RemoteProcess, request: _Request) -> None:
        self._done.discard(request.references[0])
        try:
            value = ray.get(request.references[0])
        except ray.exceptions.RayError as error:
            if any(map(has_failed, request.needs)):
                request.on_dropped()
            else:
                process.requests.appendleft(request)
                self.replace(
                    process, _cause(error), error, is_alive=not isinstance(error, ray.exceptions.ActorDiedError)
                )
            return
        process.has_replied_to.add(request.method)
        process.replied_at = time.monotonic()
        request.on_reply(value, *request.references[1:])

    def replace(
        self, process: RemoteProcess, cause: str, error: Exception | None = None, *, is_alive: bool = False
    ) -> None:
        """Terminates a process, if it still exists, and starts another in its place.

        Args:
          process: to replace.
          cause: what happened, for the log: follows the name of the process.
          error: that it failed with.
          is_alive: whether the process may still be at work.

        Raises:
          RunFailed: if the process has failed too often.
        """
        now = time.monotonic()
        process.failed_at.append(now)
        while now - process.failed_at[0] > _FORGOTTEN_SECONDS:
            process.failed_at.popleft()
        if len(process.failed_at) > self._max_restarts:
            raise RunFailed(
                f"{process.name} {cause}; it has failed {len(process.failed_at)} times within "
                f"{_FORGOTTEN_SECONDS / 60:g} minutes, more than max_restarts={self._max_restarts}"
                + (f":\n{error}" if error else "")
            )
        logger.warning("%s %s, and is replaced (%d in all)", process.name, cause, self.num_restarts + 1)
        self.num_restarts += 1
        process.terminate(is_alive=is_alive)
        requests, process.requests = process.requests, collections.deque()
        self._start(process)
        process.on_lost()
        for request in requests:
            self._done.discard(request.references[0])
            if request.arguments is None:
                request.on_dropped()
            else:
                self.submit(
                    process, request.method, *request.arguments, on_reply=request.on_reply,
                    needs=tuple(request.needs), is_repeated=True, on_dropped=request.on_dropped,
                )  # fmt: skip

    def _start(self, process: RemoteProcess) -> None:
        process.start()

        def is_ready(place: tuple[int, str]) -> None:
            process.place = place

        self.submit(process, "where", on_reply=is_ready)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        has_listened = now - self._looked_at < 2 * _LOOK_SECONDS
        self._looked_at = now
        for process in self._processes:
            if not process.requests:
                continue
            request = process.requests[0]
            if not has_listened or not _are_ready(request.needs):
                # It isn't silent by its own fault: this thread didn't look for replies, or its arguments are missing.
                process.replied_at = now
                continue
            silence = now - max(request.since, process.replied_at)
            patience = self._silence_seconds * (1 if request.method in process.has_replied_to else _SLOW_STARTS)
            if not process.is_ready:
                if silence > self._silence_seconds:
                    seconds, wanted = now - process.started_at, in_words(process.resources)
                    logger.warning("%s has waited %.0f s for a node with %s", process.name, seconds, wanted)
                    process.replied_at = now
            elif silence > patience:
                cause = f"has not replied to {request.method} for {silence:.0f} s"
                self.replace(process, cause, is_alive=True)

    def terminate(self) -> None:
        """Terminates all processes."""
        for process in self._processes:
            process.requests.clear()
            process.terminate()


def has_failed(reference: Any) -> bool:
    """Returns whether the value that a reference refers to is lost, or will never come."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False


def _are_ready(references: list[Any]) -> bool:
    return not references or not ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)[1]


def _cause(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"raised {last_line(error)}"
    if isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed:
        return f"could not be made ({last_line(error)})"
    return "died"


ONE_CPU = {"CPU": 1.0}
"""Resources that a process takes by default."""

ON_CPU = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}
"""Environment variables of a process that computes on the CPU, with one thread."""

IN_LINE = {**ON_CPU, "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
"""Variables of such a process if it has nothing else to do while it computes."""


def default_resources(num_devices: int) -> dict[str, float]:
    """Returns the resources of a learner by default: a GPU for each of its devices, if the cluster has as many."""
    has_gpus = ray.cluster_resources().get("GPU", 0) >= num_devices
    return {**ONE_CPU, "GPU": num_devices} if has_gpus else ONE_CPU


def cpus_for(processes: list[Mapping[str, float]]) -> int:
    """Returns the number of CPUs that a local Ray must claim to have, so that all of these processes find a place."""
    return max(os.cpu_count() or 1, math.ceil(sum(resources.get("CPU", 0) for resources in processes)))
