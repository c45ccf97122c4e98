"""Tells why the loop over a run was left before its end."""

import dis
import gc
import inspect
import sys
from types import FrameType, TracebackType


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
