"""Announces what a run is busy with between two records of progress, so that a view can show it."""

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[str], None]] = []


def announce(activity: str) -> None:
    """Tells what begins now, in a few words: "compiling", "evaluating 3 of 20". It lasts until the next record."""
    if _listeners:
        _listeners[-1](activity)


@contextlib.contextmanager
def announced_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Lets `listener` hear what is announced meanwhile, in place of an earlier listener."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
