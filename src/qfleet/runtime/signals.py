"""Stopping on request: the first signal asks, the second one insists."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Context manager that turns the first SIGINT or SIGTERM into a flag, so that a run can end cleanly.

    A second signal ends the process at once, by the operating system's own default: that works even while
    Python waits for compiled code. Handlers that were there before return on exit.

    Python lets only the main thread handle signals. In any other thread this does nothing and stays unset.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self._signal is not None

    @property
    def signal_name(self) -> str | None:
        """Name of that signal, such as `"SIGTERM"`."""
        return self._signal.name if self._signal is not None else None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, and can't be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        for every in _SIGNALS:
            signal.signal(every, signal.SIG_DFL)
