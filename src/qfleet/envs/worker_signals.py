"""Signals in worker processes. Only a run's main process heeds a request to stop, and it then ends the workers.

Ctrl-C, `timeout`, systemd and batch systems send a signal to all processes of a run. If it ended the workers, the run
would take them for environments that failed.

Worker processes import this module, so it must not import JAX.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds the signals back from processes that are started meanwhile, until these call `leave_to_parent`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Makes the signals have no effect on this process. Those that it starts, such as a simulator, still heed them."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _do_nothing)  # not SIG_IGN, which the processes that it starts would inherit
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
