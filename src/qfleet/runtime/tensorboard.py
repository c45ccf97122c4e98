"""TensorBoard's event file of a run."""

import time
from collections.abc import Mapping
from typing import Any

from qfleet.runtime.loggers import LoggedRun


class TensorBoardLogger:
    """Writes numbers for TensorBoard.

    It uses the part of tensorboardX that writes a file, and not its `SummaryWriter`: the thread of that one dies
    silently when it can't write, its queue fills up, and then it blocks the run for ever.
    """

    def begin(self, run: LoggedRun) -> None:
        """Opens one new file. Importing tensorboardX takes a while, so that waits until here.

        If the run was resumed, TensorBoard drops what was written before for later steps.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._writer: Any = EventsWriter(str(run.path / "events"))
        if run.resumed_at is not None:
            step = run.resumed_at + 1
            self._writer.write_event(Event(step=step, file_version="brain.Event:2"))
            self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        """Writes one record."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=env_steps, summary=Summary(value=values)))
        self._writer.flush()

    def end(self, summary: Mapping[str, Any]) -> None:
        """Closes the file."""
        self._writer.close()
