"""Keeps quiet about callbacks of tensorstore that come too late.

Where: Orbax (0.11) writes arrays by tasks of an event loop, through tensorstore. If one task fails, on a full disk for
example, Orbax raises its error and closes the loop. The results of the other tasks then find it closed, and tensorstore
prints a traceback for each of them. The error itself is raised all the same.
"""

import sys
from typing import Any

_LATE = "Event loop is closed"


def ignore_late_callbacks() -> None:
    """Makes this process print nothing about them from now on."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == _LATE):
            before(unraisable)

    sys.unraisablehook = hook
