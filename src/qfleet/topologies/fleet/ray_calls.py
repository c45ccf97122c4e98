"""Carries calls between processes on any nodes of a Ray cluster, by calls of Ray. Arrays are objects in its store."""

import copy
from collections.abc import Callable
from typing import Any

import ray

from qfleet.topologies.fleet.calls import Call, Failure, Inbox, Reply, ValueIsLost
from qfleet.topologies.fleet.references import Reference


class RayConnection:
    """Carries the calls to one process."""

    def __init__(self, handle: Any, inbox: Inbox, cause_of: Callable[[Exception], str]) -> None:
        """Has called nothing yet; the arguments are those of `RayCarrier`."""
        self._handle, self._inbox, self._cause_of = handle, inbox, cause_of
        self._is_closed = False

    def send(self, call: Call) -> None:
        """Calls the method."""
        places = [_object_of(reference) for reference in call.references]
        objects = self._handle.call.options(num_returns=1 + len(call.results)).remote(call.method, call.data, *places)
        reply, *results = objects if call.results else [objects]

        def ended(future: Any) -> None:
            if self._is_closed:
                return
            error = future.exception()
            if error is None:
                news: Reply | Failure = Reply(call, future.result(), results)
            else:
                has_ended = isinstance(error, ray.exceptions.ActorDiedError)
                news = Failure(call, self._cause_of(error), error, is_alive=not has_ended)
            self._inbox.put(self, news)
            self._inbox.wake()

        reply.future().add_done_callback(ended)

    def close(self) -> None:
        """Hears no more of the process."""
        self._is_closed = True


class RayCarrier:
    """Carries the calls of a run by Ray: a `calls.Carrier`."""

    def __init__(self, inbox: Inbox, cause_of: Callable[[Exception], str]) -> None:
        """Has no connections yet.

        Args:
          inbox: for replies and failures.
          cause_of: describes an error of Ray in words that follow the name of the process.
        """
        self._inbox, self._cause_of = inbox, cause_of

    def connect(self, handle: Any) -> RayConnection:
        """Returns a connection to a process."""
        return RayConnection(handle, self._inbox, self._cause_of)

    def read(self, place: Any) -> Any:
        """Returns a copy of a value.

        Raises:
          ValueIsLost: if it is lost with the node that kept it.
        """
        try:
            return copy.deepcopy(ray.get(place))
        except ray.exceptions.RayError as error:
            raise ValueIsLost(str(error)) from error

    def is_lost(self, place: Any) -> bool:
        """Returns whether a value is lost with the node that kept it."""
        try:
            ray.get(place, timeout=0)
        except ray.exceptions.GetTimeoutError:
            return False
        except ray.exceptions.RayError:
            return True
        return False

    def close(self) -> None:
        """Does nothing: Ray frees its objects."""


def _object_of(reference: Reference) -> Any:
    """Returns Ray's reference to a value. If this process has made the value, Ray gets it first."""
    if reference.place is None:
        reference.place = ray.put(reference.value)
    return reference.place
