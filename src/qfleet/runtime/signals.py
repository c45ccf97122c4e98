"""Requests by signals: INT, TERM and HUP ask a run to stop, USR1 asks it for a checkpoint."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

SAME_REQUEST_SECONDS = 1.0
"""Time within which further signals repeat the first request. `timeout` sends SIGTERM to a process and then to its
group, systemd sends SIGHUP right after SIGTERM, and neither means that the process should end at once."""

_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAVE = getattr(signal, "SIGUSR1", None)
_ALL = (*_STOPS, *([_SAVE] if _SAVE else []))


class StopRequested(KeyboardInterrupt):
    """A signal has asked the run to stop, and it can be left right here."""


def has_interrupted() -> bool:
    """Returns whether a signal has interrupted work in this process, anywhere in it."""
    return _has_interrupted


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Raises the KeyboardInterrupt of a Ctrl-C that comes meanwhile afterwards.

    Use this around the import of JAX: an exception in the middle of that makes its C++ code abort the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        is_asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if is_asked:
        raise KeyboardInterrupt


class StopFlag:
    """Context manager that turns signals into requests, so that a run can end cleanly.

    A context within another one shares its requests, so a command can keep one open from its start to its end. So does
    one that outlasts the first, as those of two runs do that are iterated over in turn. A signal that is ignored, as
    SIGHUP is under `nohup`, stays ignored.

    Python lets only the main thread handle signals. In any other thread this does nothing and no request arrives.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        """Changes nothing yet.

        Args:
          ends_process: whether the process ends with the context. If so, a second request ends it at once, even while
            Python waits for compiled code. After the context, the first request to stop changes nothing: the work is
            done, and the process ends with its own exit code. Otherwise a second request raises KeyboardInterrupt,
            because a notebook must survive it, and the old handlers come back. The outermost context decides.
        """
        self._requests = _Requests(ends_process)
        self._is_counted = False

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self._requests.stopped_at is not None

    def take_save_request(self) -> bool:
        """Returns whether a signal has asked for a checkpoint since the last call."""
        is_asked, self._requests.must_save = self._requests.must_save, False
        return is_asked

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raises StopRequested at once if the run must stop, and meanwhile as soon as a signal asks for it.

        Use this around work that may be left half done. Where it waits for something, it must wait in Python.
        """
        requests = self._requests
        requests.num_interruptible += 1
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            requests.num_interruptible -= 1

    def __enter__(self) -> Self:
        global _active
        self._is_counted = threading.current_thread() is threading.main_thread()
        if _active is not None:
            self._requests = _active
        elif self._is_counted:
            _active = self._requests
            self._requests.install()
        self._requests.num_contexts += self._is_counted
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        if self._is_counted and threading.current_thread() is threading.main_thread():
            self._is_counted = False
            self._requests.num_contexts -= 1
            if not self._requests.num_contexts:
                self._requests.end()
                _active = None


class _Requests:
    """What signals have asked for since the outermost context began."""

    def __init__(self, ends_process: bool) -> None:
        self._ends_process = ends_process
        self.stopped_at: float | None = None
        """Time of the first request to stop, on the monotonic clock."""
        self.must_save = False
        self.num_contexts = 0
        """Number of contexts of the main thread that share these requests. The last one puts the handlers back."""
        self.num_interruptible = 0
        """Number of places around the current one that a request to stop may interrupt."""
        self._previous: dict[signal.Signals, Any] = {}
        self._watch: _Watch | None = None

    def install(self) -> None:
        for number in _ALL:
            if signal.getsignal(number) is not signal.SIG_IGN:
                handler = self._save if number == _SAVE else self._stop
                self._previous[number] = signal.signal(number, handler)
        if self._ends_process:
            self._watch = _Watch()
            # Exit functions run in reverse order, so this one runs after those of libraries that are imported later.
            atexit.register(self._ignore)

    def end(self) -> None:
        """Puts the old handlers back, unless the process is about to end."""
        if self._ends_process:
            return
        for number, handler in self._previous.items():
            # The handler is None if it was not installed from Python. Then Python can't put it back either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _ignore(self) -> None:
        """Ignores signals while the interpreter closes, where Python takes its handlers away before the process ends.

        A request that comes so late would kill a process whose run is complete, and its exit code would deny that.
        """
        if self._watch:
            self._watch.close()
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
            if self.num_interruptible:
                global _has_interrupted
                _has_interrupted = True
                raise StopRequested
        elif time.monotonic() - self.stopped_at > SAME_REQUEST_SECONDS and not self._ends_process:
            raise KeyboardInterrupt

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.must_save = True


class _Watch:
    """A thread that ends the process at a second request to stop.

    Python runs its handlers only between instructions, so it can't do this while compiled code runs. But it tells a
    socket of each signal at once, and this thread reads that.
    """

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="qfleet-signals", daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous)
        self._writing.close()  # which ends the thread

    def _read(self) -> None:
        first: float | None = None
        with self._reading:
            while data := self._reading.recv(1):
                number = data[0]
                if number in _STOPS and first is None:
                    first = time.monotonic()
                elif number in _STOPS and time.monotonic() - (first or 0.0) > SAME_REQUEST_SECONDS:
                    _end_process(number)


def _end_process(number: int) -> None:
    """Ends this process by a signal, as if it had no handler, so that a shell sees what has ended it."""
    if os.name == "posix":
        ctypes.CDLL(None).signal(number, None)  # the default handler; Python can set it in the main thread only
        os.kill(os.getpid(), number)
    os._exit(128 + number)


_has_interrupted = False

_active: _Requests | None = None
