"""Threads that compile programs. A request to stop doesn't wait for them."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

_PREFIX = "qfleet-compile"


@contextlib.contextmanager
def compilers() -> Iterator[ThreadPoolExecutor]:
    """Yields threads that compile while the caller waits for them in Python, where a signal can interrupt it.

    If the caller leaves early, they finish what they have begun, and nobody waits for it but the end of the process.
    """
    pool = ThreadPoolExecutor(thread_name_prefix=_PREFIX)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def are_busy() -> bool:
    """Returns whether a compilation that nobody needs any more is still under way."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
