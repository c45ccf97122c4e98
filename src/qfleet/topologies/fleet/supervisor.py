"""The processes of a run on Ray: each is started, asked, watched, and replaced where it fails."""

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
from qfleet.topologies.fleet.cluster import last_line, variables

logger = logging.getLogger("qfleet")

_FORGOTTEN_SECONDS = 600.0
"""After which a process's failure doesn't count any more."""

_SLOW_STARTS = 5
"""Times the usual patience for what a process is asked for the first time, for which it compiles."""

_LOOK_SECONDS = 1.0
"""Between two looks at who is silent."""


class Remote:
    """What every process can do beside its work: runs in the process's process."""

    def __init__(self, variables: Mapping[str, str], *arguments: Any) -> None:
        """Makes the process, before which JAX wasn't used here.

        Args:
          variables: of the environment, to set first. The process may be one that Ray had ready.
          *arguments: of what does the work.
        """
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's: as many as the CPUs that it takes, by default one
        os.environ.update(variables)
        if variables.get("JAX_PLATFORMS") == "cpu":
            use_cpu_only()
        if variables.get("JAX_CPU_ENABLE_ASYNC_DISPATCH") == "false":
            compute_in_line()
        super().__init__(*arguments)

    def where(self) -> tuple[int, str]:
        """Returns its process and node, once it is made."""
        return os.getpid(), ray.get_runtime_context().get_node_id()


@dataclasses.dataclass
class _Request:
    """Something that a process was asked for."""

    method: str
    references: list[Any]
    """Of all that it returns; the first is told to `on_reply`, the others only passed on."""
    on_reply: Callable[..., None]
    needs: list[Any]
    """References that came with it."""
    arguments: tuple | None
    """To ask again with, if the process is replaced; None to forget it then."""
    on_dropped: Callable[[], None]
    since: float


class RemoteProcess:
    """A place in the run, and the process that has it at the moment."""

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
        """Starts nothing yet.

        Args:
          name: in words.
          kind: class of what runs in the process.
          arguments: of its constructor.
          resources: of Ray's, that it takes.
          environment: variables of the process.
          inherits: whether processes have the other variables of this one by themselves. Ray takes twice as long to
            start those for which it must set some.
          on_lost: called once it is replaced, and before it is asked for anything.
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
        """Methods that its process has compiled by now."""
        self.replied_at = self.started_at = 0.0
        """When it last answered, or nothing could be heard of it for reasons of others."""
        self.place: tuple[int, str] | None = None
        """Process and node, once it is there."""
        self.failed_at: collections.deque[float] = collections.deque()
        self.handle: Any = None

    @property
    def is_ready(self) -> bool:
        """Whether its process has said that it is made."""
        return self.place is not None

    def start(self) -> None:
        """Has Ray start a process in this place."""
        self.place, self.has_replied_to = None, set()
        self.started_at = self.replied_at = time.monotonic()
        self.handle = self._make.remote(*self._arguments)

    def end(self, *, is_alive: bool = False) -> None:
        """Ends the process.

        Args:
          is_alive: whether it may still be at work, or be stopped and not hear Ray. On this node it is gone then.
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
    """All processes of one run, for one thread."""

    def __init__(self, silence_seconds: float, max_restarts: int) -> None:
        self._silence_seconds, self._max_restarts = silence_seconds, max_restarts
        self._processes: list[RemoteProcess] = []
        self._done: set[Any] = set()
        self._looked_at = time.monotonic()
        self.num_restarts = 0

    def add(self, process: RemoteProcess) -> RemoteProcess:
        """Starts a process, and returns it."""
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
        """Asks a process for something, and returns references to what it returns.

        A process does what it was asked for in order, and `on_reply` is called in that order.

        Args:
          process: whom.
          method: of its class.
          *arguments: of the method; references among them are what they refer to by then.
          on_reply: called with what came first, and the references of the rest.
          num_returns: how many values the method returns.
          needs: references among the arguments: if these fail, it isn't the process that has failed.
          is_repeated: whether to ask the one that replaces it again.
          on_dropped: called instead of `on_reply` if nothing will come.
        """
        references = getattr(process.handle, method).options(num_returns=num_returns).remote(*arguments)
        references = references if num_returns > 1 else [references]
        kept = arguments if is_repeated else None
        process.requests.append(_Request(method, references, on_reply, list(needs), kept, on_dropped, time.monotonic()))
        return references

    def wait(self, seconds: float) -> None:
        """Waits so long for an answer, at most."""
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
        """Deals with all answers that are there, and with processes that have failed.

        Raises:
          RunFailed: if one has failed too often.
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
        """Ends a process, if there is one, and starts another in its place.

        Raises:
          RunFailed: if that has been done too often.
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
        process.end(is_alive=is_alive)
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
            if not has_listened or not _are_there(request.needs):
                process.replied_at = now  # it was this process that didn't listen, or it waits for others
                continue
            silence = now - max(request.since, process.replied_at)
            patience = self._silence_seconds * (1 if request.method in process.has_replied_to else _SLOW_STARTS)
            if not process.is_ready:
                if silence > self._silence_seconds:
                    wanted = " and ".join(f"{amount:g} {name}" for name, amount in process.resources.items())
                    logger.warning(
                        "%s has waited %.0f s for a place with %s", process.name, now - process.started_at, wanted
                    )
                    process.replied_at = now
            elif silence > patience:
                cause = f"has said nothing for {silence:.0f} s, asked to {request.method}"
                self.replace(process, cause, is_alive=True)

    def end(self) -> None:
        """Ends all of them."""
        for process in self._processes:
            process.requests.clear()
            process.end()


def has_failed(reference: Any) -> bool:
    """Returns whether what a reference is to will never come, or is lost."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False


def _are_there(references: list[Any]) -> bool:
    return not references or not ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)[1]


def _cause(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"raised {last_line(error)}"
    if isinstance(error, ray.exceptions.ActorDiedError) and getattr(error, "_actor_init_failed", False):
        return f"could not be made ({last_line(error)})"
    return "died"


ONE_CPU = {"CPU": 1.0}
"""What a process takes by default."""

ON_CPU = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}
"""Variables of a process that computes on the CPU, with one thread."""

IN_LINE = {**ON_CPU, "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
"""The same, where it does nothing else meanwhile."""


def default_resources(num_devices: int) -> dict[str, float]:
    """Returns what the learner takes by default: a GPU for each device of its mesh, where the cluster has them."""
    has_gpus = ray.cluster_resources().get("GPU", 0) >= num_devices
    return {**ONE_CPU, "GPU": num_devices} if has_gpus else ONE_CPU


def cpus_for(processes: list[Mapping[str, float]]) -> int:
    """Returns how many CPUs a Ray of this machine must claim to have for all of these to have a place."""
    return max(os.cpu_count() or 1, math.ceil(sum(resources.get("CPU", 0) for resources in processes)))
