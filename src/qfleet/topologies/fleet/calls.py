"""Calls of methods in other processes: what is sent, who carries it, and what the supervisor hears of it.

A call names its method by the function itself, `submit(process, RemoteActor.collect, version, params, ...)`, so that a
type checker and "go to definition" can follow it. Large arrays among its arguments and in its reply are references. Two
modules carry calls: `channel` within one machine, and `ray_calls` anywhere in a Ray cluster. The numbers are the same.
"""

import collections
import dataclasses
import os
import selectors
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from qfleet.topologies.fleet.references import Reference


@dataclasses.dataclass(eq=False)
class Call:
    """A call of a method in another process, which has not been answered yet."""

    method: str
    data: bytes
    """Its arguments, from `references.dump`."""
    references: list[Reference]
    """The references among its arguments."""
    results: list[Reference]
    """The references that its reply will hold."""
    on_reply: Callable[[Any], None]
    on_dropped: Callable[[], None]
    is_repeated: bool
    """Whether it is made again if the process is replaced."""
    since: float
    """When it was submitted, or sent."""
    is_sent: bool = False
    news: "Reply | Failure | None" = None
    """What has been heard of it and has not been dealt with."""


class Reply(NamedTuple):
    """A call has been answered."""

    call: Call
    data: bytes
    """The reply, from `references.dump`."""
    places: list[Any]
    """Where the values of its references lie."""


class Failure(NamedTuple):
    """A call has failed, or its process has ended."""

    call: Call | None
    """None if it is the process that has ended."""
    cause: str
    """What happened, for the log: follows the name of the process."""
    error: Exception | None = None
    is_alive: bool = False
    """Whether the process may still be at work."""


class Connection(Protocol):
    """Carries the calls to one process, and their replies to the inbox."""

    def send(self, call: Call) -> None:
        """Sends a call, whose references all have values. The process answers calls in the order of sending."""
        ...

    def close(self) -> None:
        """Hears no more of the process, which is gone or about to be killed."""
        ...


class Carrier(Protocol):
    """Makes connections, and knows where values lie."""

    def connect(self, handle: Any) -> Connection:
        """Returns a connection to a process that Ray has been asked to start.

        Args:
          handle: of the process, as Ray knows it.
        """
        ...

    def read(self, place: Any) -> Any:
        """Returns a copy of a value, or raises `ValueIsLost`."""
        ...

    def is_lost(self, place: Any) -> bool:
        """Returns whether a value is lost with the node that kept it."""
        ...

    def close(self) -> None:
        """Frees what it has reserved, once all processes are gone."""
        ...


class ValueIsLost(Exception):
    """A value was lost with the node that kept it."""


class Inbox:
    """What was heard of processes, by any thread, until the supervisor deals with it."""

    def __init__(self) -> None:
        self._news: collections.deque[tuple[Any, Reply | Failure]] = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._waker, self._alarm = os.pipe()
        for end in (self._waker, self._alarm):
            os.set_blocking(end, False)
        self._selector.register(self._waker, selectors.EVENT_READ, self._was_woken)
        self._is_awake = self._is_closed = False
        self._lock = threading.Lock()

    def put(self, connection: Any, news: Reply | Failure) -> None:
        """Adds news of a connection; from another thread, `wake` must follow."""
        self._news.append((connection, news))

    def wake(self) -> None:
        """Makes the thread that waits look around. Any thread may call it."""
        with self._lock:
            if not self._is_awake and not self._is_closed:
                self._is_awake = True
                os.write(self._alarm, b"!")

    def take(self) -> list[tuple[Any, Reply | Failure]]:
        """Returns all news, in the order in which they came."""
        taken = []
        while self._news:
            taken.append(self._news.popleft())
        return taken

    def listen(self, file: Any, events: int, on_ready: Callable[[int], None]) -> None:
        """Has `wait` call a function with the events of a socket, such as `selectors.EVENT_READ`; 0 ends that."""
        if file in self._selector.get_map():
            if events:
                self._selector.modify(file, events, on_ready)
            else:
                self._selector.unregister(file)
        elif events:
            self._selector.register(file, events, on_ready)

    def wait(self, seconds: float) -> None:
        """Waits until there may be news, for at most so many seconds."""
        ready = self._selector.select(0 if self._news else seconds)
        for key, events in ready:
            key.data(events)

    def close(self) -> None:
        """Closes what it has opened."""
        with self._lock:  # so that no other thread writes to a descriptor that is another file's by then
            self._is_closed = True
            self._selector.close()
            os.close(self._waker)
            os.close(self._alarm)

    def _was_woken(self, _: int) -> None:
        with self._lock:
            os.read(self._waker, 1)
            self._is_awake = False
