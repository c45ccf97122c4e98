"""How the loop over a run is left before its end: why, and that this doesn't go unnoticed at the end of the program."""

import dis
import functools
import gc
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from qfleet.envs.failures import describe
from qfleet.runtime.workarounds.python_exit import call_before_threads_end

logger = logging.getLogger("qfleet")

G = TypeVar("G", bound=Generator[Any, None, None])

_open_iterators: "weakref.WeakSet[Generator[Any, None, None]]" = weakref.WeakSet()


def closed_at_exit(iterator: G) -> G:
    """Returns the iterator of a run, which will be closed at the end of the program if it has not been closed by then.

    A program that keeps it in a variable may end without leaving a loop. Then Python would close it so late that
    nothing can be saved any more. In another thread than the main one, the end of the main thread isn't the end of the
    loop, so nothing is done there.
    """
    if threading.current_thread() is threading.main_thread():
        _watch_the_end()
        _open_iterators.add(iterator)
    return iterator


@functools.cache  # once for each process
def _watch_the_end() -> None:
    call_before_threads_end(close_open_iterators)


def close_open_iterators() -> None:
    """Closes all iterators that `closed_at_exit` was given and that haven't been closed."""
    for iterator in list(_open_iterators):
        try:
            iterator.close()
        except Exception as error:  # the others are to be closed, too
            logger.warning("the end of a run failed: %s", describe(error))


def failure_of_loop() -> str:
    """Returns where an exception has left the loop over a run; '' if none has, or none can be found.

    Call it in the generator that the loop iterates over, once that catches GeneratorExit. Python tells a generator only
    that it is closed. But if an exception is the reason, it has left a traceback of the frame that has the loop, and
    the frame is still at the instruction that failed, or at one that raises again. A `break`, a `return` or a call of
    `close` is at another instruction. If a generator of somebody else is in between, such as a progress bar's, it is
    closed for the same reason, so its caller is looked at. Nothing is found if the iterator is also in a variable,
    because then it is closed later.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        raises_again = dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("RERAISE", "RAISE_VARARGS")
        for trace in gc.get_referrers(frame):
            if isinstance(trace, TracebackType) and (raises_again or trace.tb_lasti == frame.f_lasti):
                break
        else:
            return ""
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            return f"an exception has left the loop over the run, at {frame.f_code.co_filename}:{trace.tb_lineno}"
        frame = frame.f_back
    return ""
