"""Listens to a group of processes: passes on what they report, and tells when one of them is lost."""

import signal
import time
from collections.abc import Iterator
from typing import Any

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.runtime.child_process import Messages
from qfleet.runtime.signals import StopFlag
from qfleet.topologies.all_reduce.processes import ProcessGroup, ProcessLost

MOST_SILENT_PROGRESS = 10
"""Multiple of `silence_seconds` after which the group counts as lost if no process makes progress, even though all
of them are alive."""

_POLL_SECONDS = 0.05
"""Longest wait for a report before the processes are checked."""

_GATHER_SECONDS = 0.3
"""Wait after the first process has died. The others fail because of it; by then the exit codes show which one was the
cause."""


class Listener:
    """Listens to one group of processes, from its start to its end."""

    def __init__(self, config: AllReduceConfig, group: ProcessGroup) -> None:
        """Starts nothing yet; `messages` does.

        Args:
          config: config of the topology, which says how long a process may be silent.
          group: the processes.
        """
        self._silence_seconds, self._group = config.silence_seconds, group
        self._starts_all = config.coordinator is None
        self._heard_at: dict[int, float] = {}
        """When each process last reported anything."""
        self._reports = Messages()

    def messages(self, stop: StopFlag) -> Iterator[dict[str, Any]]:
        """Starts the processes, and yields their messages of progress until all have ended well.

        If it is asked to stop before there is any progress, there is nothing to save, and it returns at once.

        Args:
          stop: a request to stop the run, which is passed on to the processes.

        Raises:
          ConfigError, RunFailed: as a process raised it.
          ProcessLost: if a process died or fell silent.
        """
        group = self._group
        group.start(lambda: stop.requested)
        progressed_at = time.monotonic()
        self._heard_at = dict.fromkeys(group.exit_codes(), progressed_at)
        is_stopping = has_begun = False
        while True:
            # Ask for exit codes before reading: everything that a process reported before its end is read after that.
            have_ended = None not in group.exit_codes().values()
            for message in self._read():
                if message["kind"] == "progress":
                    progressed_at, has_begun = time.monotonic(), True
                    yield message
                _raise_if_failed(message)
            if stop.requested and not is_stopping:
                if not has_begun and self._starts_all:
                    return
                is_stopping = True
                group.ask_to_stop()
            self._check_alive(is_stopping)
            if have_ended and (is_stopping or group.reports_have_ended()):
                return
            self._check_silence(progressed_at)

    def stop(self) -> None:
        """Asks all processes to stop, and waits until they have ended, or for as long as they may be silent."""
        self._group.ask_to_stop()
        deadline = time.monotonic() + self._silence_seconds
        while None in self._group.exit_codes().values() and time.monotonic() < deadline:
            for _ in self._read():  # a process whose pipe is full would wait until it is read
                pass

    def _read(self) -> Iterator[dict[str, Any]]:
        """Waits for a short time, and yields the messages that are complete by then."""
        for i, data in self._group.read(_POLL_SECONDS):
            self._heard_at[i] = time.monotonic()
            yield from self._reports.add(i, data)

    def _check_alive(self, is_stopping: bool) -> None:
        """Raises ProcessLost if a process has died, or what it raised if it reported that."""
        if not self._died(is_stopping):
            return
        time.sleep(_GATHER_SECONDS)
        for message in self._read():  # the last messages of the processes that have ended
            _raise_if_failed(message)
        codes = self._died(is_stopping)
        # A process that was killed is the cause. The others fail or abort because it is missing.
        first = min(codes, key=lambda i: (codes[i] >= 0 or codes[i] == -signal.SIGABRT, i))
        raise ProcessLost(f"{self._group.name(first)} {self._group.cause(first)}")

    def _died(self, is_stopping: bool) -> dict[int, int]:
        """Returns the exit codes of the processes that ended when they should not have, by number."""
        # A process that is asked to stop while it starts ends by SIGTERM, because it can't handle the signal yet.
        expected = (0, -signal.SIGTERM) if is_stopping else (0,)
        codes = self._group.exit_codes()
        return {i: code for i, code in codes.items() if code is not None and code not in expected}

    def _check_silence(self, progressed_at: float) -> None:
        """Raises ProcessLost if a process has reported nothing for too long, or if all are alive without progress."""
        now, silence_seconds, codes = time.monotonic(), self._silence_seconds, self._group.exit_codes()
        for i, code in codes.items():
            if code is None and now - self._heard_at[i] > silence_seconds:
                raise ProcessLost(f"{self._group.name(i)} gave no sign of life for {silence_seconds:g} s")
        # Only process 0 reports progress; a launcher that does not have it can't judge.
        if 0 in codes and now - progressed_at > MOST_SILENT_PROGRESS * silence_seconds:
            raise ProcessLost(f"no process made progress for {MOST_SILENT_PROGRESS * silence_seconds:g} s")


def _raise_if_failed(message: dict[str, Any]) -> None:
    if message["kind"] == "failed":
        raise (ConfigError if message["is_config"] else RunFailed)(message["error"])
