"""The standard streams of a command: open ones in place of closed ones, and a stdout that only carries the answer."""

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator


def prepare_streams() -> None:
    """Opens /dev/null in place of stdin, stdout or stderr if it is closed, and lets stdout take any text.

    After `>&-`, the next file that is opened would get the free descriptor, and whatever is printed would end up in it.
    A path or a name may have characters that the terminal's encoding lacks; they are then written as escapes.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            _point_to_null(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def give_stdout_up() -> None:
    """Lets further output go nowhere, because Python would complain at its end that it can't write to stdout."""
    with contextlib.suppress(OSError, ValueError):
        _point_to_null(sys.stdout.fileno())


@contextlib.contextmanager
def only_the_answer_on_stdout(is_wanted: bool = True) -> Iterator[None]:
    """Sends all output of the work within to stderr, so that stdout gets nothing but what is printed afterwards.

    This covers what C code and child processes print, for example an environment's library.

    Args:
      is_wanted: without it, this does nothing.
    """
    if not is_wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C code may have printed into a buffer, which goes to the descriptor of then
        os.dup2(kept, 1)
        os.close(kept)


def _point_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)  # child processes are as little prepared for a closed stream
