"""TensorBoard's event file of a run, written by a thread that can neither delay nor end the run."""

import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qfleet.envs.failures import describe

logger = logging.getLogger("qfleet")

CLOSE_SECONDS = 5.0
"""The longest wait for the last events, on a file system that doesn't answer."""

_FLUSH_SECONDS = 10.0
_MOST_WAITING = 1000  # records


class _Record(NamedTuple):
    env_steps: int
    wall_time: float
    numbers: Mapping[str, float]


class EventLog:
    """Writes numbers for TensorBoard. If that fails, it logs one warning and writes nothing more.

    It uses the part of tensorboardX that writes a file, and not its `SummaryWriter`: the thread of that one dies
    silently when it can't write, its queue fills up, and then it blocks the run for ever.
    """

    def __init__(self, folder: Path) -> None:
        """Starts nothing; the first record does."""
        self._folder = folder
        self._purge_step: int | None = None
        self._records: queue.Queue[_Record | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._is_off = False

    def purge_from(self, env_steps: int) -> None:
        """Makes TensorBoard drop what was written before for this step and later ones. Call it before `write`."""
        self._purge_step = env_steps

    def write(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        """Adds one record, and returns at once."""
        if self._is_off:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="qfleet-tensorboard", daemon=True)
            self._thread.start()
        try:
            self._records.put_nowait(_Record(env_steps, time.time(), numbers))
        except queue.Full:
            self._turn_off(f"{_MOST_WAITING} records wait to be written")

    def close(self) -> None:
        """Writes what waits to be written, but waits no longer than `CLOSE_SECONDS`. Idempotent."""
        if self._thread is None:
            return
        if not self._is_off:
            self._records.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._turn_off(f"writing the last of it took more than {CLOSE_SECONDS:g} s")
        self._thread = None

    def _turn_off(self, reason: str) -> None:
        if not self._is_off:
            logger.warning(
                "TensorBoard's events can't be written in %s, and end here; the run goes on: %s", self._folder, reason
            )
        self._is_off = True

    def _run(self) -> None:
        try:
            writer = _open(self._folder, self._purge_step)
            try:
                self._write_all(writer)
            finally:
                writer.close()
        except Exception as error:  # whatever it is, it must not cost the run
            self._turn_off(describe(error))

    def _write_all(self, writer: Any) -> None:
        """Writes records until there is a None in their place, or the log is turned off."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        flushed_at = time.monotonic()
        while not self._is_off:
            try:
                record = self._records.get(timeout=_FLUSH_SECONDS)
            except queue.Empty:
                pass
            else:
                if record is None:
                    return
                values = [Summary.Value(tag=name, simple_value=value) for name, value in record.numbers.items()]
                event = Event(wall_time=record.wall_time, step=record.env_steps, summary=Summary(value=values))
                writer.write_event(event)
            if time.monotonic() - flushed_at > _FLUSH_SECONDS:
                writer.flush()
                flushed_at = time.monotonic()


def _open(folder: Path, purge_step: int | None) -> Any:
    """Returns a tensorboardX writer of one new file. Importing it takes a while, so that waits for the first record."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    writer = EventsWriter(str(folder / "events"))
    if purge_step is not None:
        writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    return writer
