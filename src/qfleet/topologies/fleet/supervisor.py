"""Supervises the processes of a run on Ray: starts them, passes on requests and replies, and replaces lost ones."""

import collections
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, TypeVarTuple

import ray

from qfleet.config import RunFailed
from qfleet.runtime.devices import compute_in_line, use_cpu_only
from qfleet.topologies.fleet.calls import Call, Carrier, Connection, Failure, Inbox
from qfleet.topologies.fleet.channel import Switchboard, Welcome, serve
from qfleet.topologies.fleet.cluster import in_words, last_line, variables
from qfleet.topologies.fleet.ray_calls import RayCarrier
from qfleet.topologies.fleet.references import Reference, dump, load
from qfleet.topologies.fleet.shared_memory import can_share

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")
As = TypeVarTuple("As")

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

    def call(self, method: str, data: bytes, *values: Any) -> Any:
        """Calls a method, for `RayConnection`.

        Args:
          method: its name.
          data: its arguments, from `references.dump`.
          *values: the values that the references among the arguments refer to.

        Returns:
          The reply, from `references.dump`, and then the values of its references.
        """
        reply, results = dump(getattr(self, method)(*load(data, [Reference(value) for value in values])))
        return (reply, *(result.value for result in results)) if results else reply

    def serve(self, welcome: Welcome) -> None:
        """Carries out the calls that come through a channel, until its other end is closed."""
        serve(self, welcome)


class RemoteProcess(Generic[P]):
    """A place in the run, and the process that holds it at the moment. Its methods are those of `kind`."""

    def __init__(
        self,
        name: str,
        kind: type[P],
        arguments: tuple,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
        on_lost: Callable[[], None],
        on_ready: Callable[[], None] = lambda: None,
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
          on_ready: called when the process has found a node and its constructor has finished.
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
        self._kind, self._options, self._arguments = kind, options, (dict(environment), *arguments)
        self.on_lost, self.on_ready = on_lost, on_ready
        self.calls: collections.deque[Call] = collections.deque()
        """Calls that have not been answered, in the order in which the process carries them out."""
        self.has_replied_to: set[str] = set()
        """Methods that the current process has replied to, and so has compiled."""
        self.replied_at = self.started_at = 0.0
        """Time of the last reply, or of the last moment when no reply could have arrived."""
        self.place: tuple[int, str] | None = None
        """Process ID and node ID; None until the process has been made."""
        self.failed_at: collections.deque[float] = collections.deque()
        """Times of the failures that still count."""
        self.handle: Any = None
        self.connection: Connection | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the process has a node and its constructor has finished."""
        return self.place is not None

    def start(self, now: float) -> None:
        """Starts a process in this place; `now` is the time, in seconds."""
        self.place, self.has_replied_to = None, set()
        self.started_at = self.replied_at = now
        self.handle = self._launch()

    def terminate(self, *, is_alive: bool = False) -> None:
        """Terminates the process.

        Args:
          is_alive: whether the process may still be at work, or be stopped so that it doesn't hear Ray. If it is on
            this node, it is then killed by a signal.
        """
        if self.handle is None:
            return
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        self._kill(is_alive=is_alive)
        self.handle = None

    @functools.cached_property
    def _make(self) -> Any:
        return ray.remote(self._kind).options(**self._options)

    def _launch(self) -> Any:
        """Makes Ray start a process, and returns its handle."""
        return self._make.remote(*self._arguments)

    def _kill(self, *, is_alive: bool) -> None:
        """Kills the process that `handle` stands for."""
        ray.kill(self.handle)
        if is_alive and self.place is not None and self.place[1] == ray.get_runtime_context().get_node_id():
            try:
                os.kill(self.place[0], signal.SIGKILL)
            except ProcessLookupError:
                self.place = None


class Supervisor:
    """All processes of one run. Only one thread may use it, except where a method says otherwise."""

    def __init__(self, silence_seconds: float, max_restarts: int) -> None:
        self._silence_seconds, self._max_restarts = silence_seconds, max_restarts
        self._processes: list[RemoteProcess] = []
        self._owners: dict[Connection, RemoteProcess] = {}
        self._waiting: dict[RemoteProcess, None] = {}
        """Processes with a call whose arguments have not all been made yet. A set that keeps its order."""
        self._inbox: Inbox
        self._carrier: Carrier
        self.clock: Callable[[], float]
        """Tells the time, in seconds."""
        self._looked_at: float
        self.num_restarts = 0

    def open(self, inbox: Inbox, carrier: Carrier, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes what it works with. To be called before the first process is added.

        Args:
          inbox: for what is heard of the processes.
          carrier: carries the calls, and puts what it hears into the inbox.
          clock: tells the time, in seconds.
        """
        self._inbox, self._carrier, self.clock = inbox, carrier, clock
        self._looked_at = clock()

    def add(self, process: RemoteProcess[P]) -> RemoteProcess[P]:
        """Starts a process and returns it."""
        self._processes.append(process)
        self._start(process)
        return process

    def submit(
        self,
        process: RemoteProcess[P],
        method: Callable[[P, *As], R],
        *arguments: *As,
        on_reply: Callable[[R], None] = lambda _: None,
        results: Sequence[Reference[Any]] = (),
        is_repeated: bool = False,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> None:
        """Calls a method in a process.

        A process carries out its calls in order, and `on_reply` is called in the same order. A call waits here until
        the references among its arguments have values, and so do the later calls of the process.

        Args:
          process: that carries out the call.
          method: of its class.
          *arguments: of the method: tuples, lists, dictionaries and arrays, with references for large ones.
          on_reply: called with the reply.
          results: the references that the reply will hold, in their order. Later calls may have them as arguments.
          is_repeated: whether to make the call again if the process is replaced.
          on_dropped: called instead of `on_reply` if there will be no reply: the process was replaced, or the value of
            a reference among the arguments is lost. It is never called before this method has returned.
        """
        data, references = dump(arguments)
        call = Call(
            method.__name__, data, references, list(results), on_reply, on_dropped, is_repeated, self.clock()
        )  # fmt: skip
        has_to_wait = process.calls and not process.calls[-1].is_sent
        process.calls.append(call)
        if has_to_wait or not all(reference.is_there for reference in references):
            self._waiting[process] = None
        else:
            self._send(process, call)

    def wait(self, seconds: float) -> None:
        """Waits for news of a process, for at most so many seconds."""
        self._inbox.wait(seconds)

    def wake(self) -> None:
        """Ends a wait. Any thread may call it."""
        self._inbox.wake()

    def process_replies(self) -> None:
        """Deals with all that has been heard of the processes, and replaces those that have failed.

        Raises:
          RunFailed: if a process has failed too often.
        """
        for connection, news in self._inbox.take():
            process = self._owners.get(connection)
            if process is None:  # it has been replaced
                continue
            if news.call is None:
                self.replace(process, news.cause, news.error, is_alive=news.is_alive)
            else:
                news.call.news = news
                self._process_news(process)
        for process in list(self._waiting):
            self._send_calls(process)
        self._look_for_silence()

    def value(self, reference: Reference[T]) -> T:
        """Returns a copy of a reference's value. Any thread may call it.

        Raises:
          ValueIsLost: if it is lost with the node that kept it.
        """
        if reference.has_value:
            return reference.value
        value: T = self._carrier.read(reference.place)
        return value

    def is_lost(self, reference: Reference) -> bool:
        """Returns whether the value of a reference will never be there, or is lost with the node that kept it."""
        return reference.is_lost or (reference.place is not None and self._carrier.is_lost(reference.place))

    def _send_calls(self, process: RemoteProcess) -> None:
        """Sends the calls whose arguments are there, up to the first whose arguments aren't."""
        while (call := next((call for call in process.calls if not call.is_sent), None)) is not None:
            if any(reference.is_lost for reference in call.references):
                process.calls.remove(call)
                self._drop(call)  # which may submit other calls to the same process
            elif not all(reference.is_there for reference in call.references):
                self._waiting[process] = None
                return
            else:
                self._send(process, call)
        self._waiting.pop(process, None)

    def _send(self, process: RemoteProcess, call: Call) -> None:
        call.is_sent, call.since = True, self.clock()
        assert process.connection is not None
        process.connection.send(call)

    def _process_news(self, process: RemoteProcess) -> None:
        """Deals with the news of a process's calls, in the order of the calls."""
        while process.calls and (news := process.calls[0].news) is not None:
            call = process.calls[0]
            if isinstance(news, Failure) and not (news.is_alive and any(map(self.is_lost, call.references))):
                self.replace(process, news.cause, news.error, is_alive=news.is_alive)
                return
            process.calls.popleft()
            process.replied_at = self.clock()
            if isinstance(news, Failure):
                self._drop(call)
                continue
            process.has_replied_to.add(call.method)
            for reference, place in zip(call.results, news.places, strict=True):
                reference.place = place
            call.on_reply(load(news.data, call.results))

    def _drop(self, call: Call) -> None:
        for reference in call.results:
            reference.is_lost = True
        call.on_dropped()

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
        now = self.clock()
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
        self._terminate(process, is_alive=is_alive)
        calls, process.calls = process.calls, collections.deque()
        self._start(process)
        process.on_lost()
        for call in calls:
            if call.is_repeated:
                call.is_sent, call.news = False, None
                process.calls.append(call)
            else:
                self._drop(call)
        self._send_calls(process)

    def _start(self, process: RemoteProcess) -> None:
        process.start(self.clock())
        process.connection = self._carrier.connect(process.handle)
        self._owners[process.connection] = process

        def is_ready(place: tuple[int, str]) -> None:
            process.place = place
            process.on_ready()

        self.submit(process, InRemoteProcess.where, on_reply=is_ready)

    def _terminate(self, process: RemoteProcess, *, is_alive: bool = False) -> None:
        if process.connection is not None:
            del self._owners[process.connection]
        process.terminate(is_alive=is_alive)

    def _look_for_silence(self) -> None:
        now = self.clock()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        has_listened = now - self._looked_at < 2 * _LOOK_SECONDS
        self._looked_at = now
        for process in self._processes:
            if not process.calls:
                continue
            call = process.calls[0]
            if not has_listened or not call.is_sent:
                # It isn't silent by its own fault: this thread didn't look for replies, or its arguments are missing.
                process.replied_at = now
                continue
            silence = now - max(call.since, process.replied_at)
            patience = self._silence_seconds * (1 if call.method in process.has_replied_to else _SLOW_STARTS)
            if not process.is_ready:
                if silence > self._silence_seconds:
                    seconds, wanted = now - process.started_at, in_words(process.resources)
                    logger.warning("%s has waited %.0f s for a node with %s", process.name, seconds, wanted)
                    process.replied_at = now
            elif silence > patience:
                cause = f"has not replied to {call.method} for {silence:.0f} s"
                self.replace(process, cause, is_alive=True)

    def terminate(self) -> None:
        """Terminates all processes. Values that references refer to are lost."""
        for process in self._processes:
            process.calls.clear()
            self._terminate(process)
        self._carrier.close()
        self._inbox.close()


def carrier_of(inbox: Inbox, *, is_one_machine: bool) -> Carrier:
    """Returns what carries the calls of a run.

    Args:
      inbox: for what is heard of the processes.
      is_one_machine: whether all processes run on this machine, so that they can share memory.
    """
    return Switchboard(inbox, _cause) if is_one_machine and can_share() else RayCarrier(inbox, _cause)


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
