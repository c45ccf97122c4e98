"""A process of a run on Ray, started without Ray, as `python -m` this module: it times the calls of its methods."""

import os
import pickle
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from qfleet.runtime.process import peak_rss_bytes


class TimedCall(NamedTuple):
    """When a method was called, by the CPU's time of all threads and by the clock, and when it returned."""

    method: str
    began: tuple[float, float]
    ended: tuple[float, float]


class Meter:
    """An object whose methods are timed. Other processes call it in place of the object."""

    def __init__(self, target: Any) -> None:
        """Times the methods of an object."""
        self._target = target
        self._calls: list[TimedCall] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        def timed(*arguments: Any) -> Any:
            began = _now()
            try:
                return method(*arguments)
            finally:
                self._calls.append(TimedCall(name, began, _now()))

        return timed

    def where(self) -> tuple[int, str]:
        """Returns process ID and no node, because there is no Ray."""
        return os.getpid(), ""

    def make_object(self) -> None:
        """Does nothing, because the object is there already."""

    def nothing(self) -> None:
        """Does nothing: the cost of a call."""

    def work(self, seconds: float) -> float:
        """Works for a while, and returns the CPU time of all threads so far."""
        ends_at = time.perf_counter() + seconds
        while time.perf_counter() < ends_at:
            pass
        return time.process_time()

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all threads so far."""
        return time.process_time()

    def calls(self) -> tuple[list[tuple], int]:
        """Returns the calls so far, and the most memory that the process has taken, in bytes."""
        end = TimedCall("calls", _now(), _now())
        return [tuple(each) for each in (*self._calls, end)], peak_rss_bytes()


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


class ServedSpec(NamedTuple):
    """What such a process runs."""

    kind: type
    """A class of `InRemoteProcess`."""
    arguments: tuple
    variables: Mapping[str, str]
    welcome: Any
    """Where it finds the process that calls it."""


def main() -> None:
    """Makes what a file describes, and carries out calls until nobody is left to call."""
    with open(sys.argv[1], "rb") as file:
        spec: ServedSpec = pickle.load(file)  # written by the process that has started this one
    from qfleet.topologies.fleet.channel import serve

    serve(Meter(spec.kind(spec.variables, *spec.arguments)), spec.welcome)


if __name__ == "__main__":
    main()
