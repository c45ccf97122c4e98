"""Python calls exit functions (`atexit`) after it has ended executors. Seen in Python 3.11 to 3.13.

From then on nothing that needs a thread works, and Orbax writes checkpoints in threads: it would wait for ever. There
is no public way to be called before. In Python 3.12 no thread can be started there either, but that is an error, and
nothing waits.
"""

import threading
from collections.abc import Callable


def call_before_threads_end(function: Callable[[], object]) -> None:
    """Calls a function when the main thread has come to its end, while threads can still be used."""
    threading._register_atexit(function)  # type: ignore[attr-defined]
