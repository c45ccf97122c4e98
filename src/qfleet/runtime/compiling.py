"""Threads that compile programs. A request to stop doesn't wait for them."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def compilers() -> Iterator[ThreadPoolExecutor]:
    """Yields threads that compile while the caller waits for them in Python, where a signal can interrupt it.

    If the caller leaves early, they finish what they have begun, and nobody waits for it but the end of the process.
    """
    pool = ThreadPoolExecutor(thread_name_prefix="qfleet-compile")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
