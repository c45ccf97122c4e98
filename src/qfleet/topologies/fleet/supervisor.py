"""Supervises the processes of a run on Ray: starts them, passes on requests and replies, and replaces lost ones."""

import collections
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple

import ray

from qfleet.config import RunFailed
from qfleet.topologies.fleet.calls import Call, Carrier, Connection, Failure, Inbox
from qfleet.topologies.fleet.channel import Switchboard
from qfleet.topologies.fleet.cluster import last_line
from qfleet.topologies.fleet.ray_calls import RayCarrier
from qfleet.topologies.fleet.references import Reference, dump, load
from qfleet.topologies.fleet.remote_process import ProcessHost, RemoteProcess
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
        has_to_wait = len(process.calls) > 0 and not process.calls[-1].is_sent
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

        def is_placed(place: tuple[int, str]) -> None:
            process.place = place

        def is_made(_: None) -> None:
            process.is_ready = True
            process.on_ready()

        self.submit(process, ProcessHost.where, on_reply=is_placed)
        self.submit(process, ProcessHost.make_object, on_reply=is_made)

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
            if process.place is None:
                if silence > self._silence_seconds:
                    seconds = now - process.started_at
                    logger.warning("%s has waited %.0f s for a node with %s", process.name, seconds, process.wants)
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
    if is_one_machine and can_share():
        try:
            return Switchboard(inbox, _cause)
        except OSError as error:  # such as a limit of this process's memory that is below that of the machine
            logger.warning("the processes can't share memory (%s), so Ray carries all, which takes longer", error)
    return RayCarrier(inbox, _cause)


def _cause(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"raised {last_line(error)}"
    if isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed:
        return f"could not be made ({last_line(error)})"
    return "died"
