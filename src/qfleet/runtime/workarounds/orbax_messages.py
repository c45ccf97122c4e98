"""Keeps Orbax from printing what the run says itself.

Where: Orbax (0.11) logs each save through absl, and also the tracebacks of errors that it raises. It writes arrays by
tasks of an event loop, through tensorstore. If one task fails, on a full disk for example, Orbax raises its error and
closes the loop. asyncio then logs the errors of the other tasks, and tensorstore, which finds the loop closed, prints a
traceback for each of them.
"""

import logging
import os
import sys
from typing import Any

_FOLDER = f"{os.sep}orbax{os.sep}"
_LATE = "Event loop is closed"


def keep_orbax_quiet() -> None:
    """Makes this process print nothing of this from now on. Errors are raised all the same."""
    logging.getLogger("absl").addFilter(lambda record: _FOLDER not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: _FOLDER not in _with_traceback(record))
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == _LATE):
            before(unraisable)

    sys.unraisablehook = hook


def _with_traceback(record: logging.LogRecord) -> str:
    return record.getMessage() + (logging.Formatter().formatException(record.exc_info) if record.exc_info else "")
