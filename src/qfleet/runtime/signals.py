"""Stopping a run on request: the first signal asks, the second one ends the process."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Context manager that turns the first SIGINT or SIGTERM into a flag, so that a run can end cleanly.

    A second signal ends the process at once, through the operating system's default handler. This works even while
    Python waits for compiled code. On exit, the handlers that were there before are put back.

    Python lets only the main thread handle signals. In any other thread this does nothing and the flag stays unset.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether a signal has asked the run to stop."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # The handler is None if it was not installed from Python. Then Python can't put it back either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
