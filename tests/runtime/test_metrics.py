"""Metrics: each step appears once, in JSON that any parser reads, and equally in TensorBoard."""

import errno
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qfleet.config import ConfigError, TrainConfig
from qfleet.runtime import loggers
from qfleet.runtime.metrics import MetricsWriter
from qfleet.runtime.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", TrainConfig(env="CartPole-v1"))


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    text = run.metrics_path.read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def events(run: RunDirectory) -> list[Any]:
    """Reads TensorBoard's files: records of length, checksum, protocol buffer, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(run.path.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns):
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack("<Q", data[start : start + 8])
            found.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += length + 16
    return found


def test_each_record_is_one_line_and_one_point_per_value(run: RunDirectory) -> None:
    with MetricsWriter(run) as writer:
        writer.write(100, {"loss": 0.5, "return": None})
        assert lines(run)[0]["env_steps"] == 100, "a record is on disk at once"
        writer.write(200, {"loss": math.nan, "return": 20})
        writer.write(2**40, {"loss": math.inf, "return": 21.0})
    first, second, third = lines(run)
    assert (first["loss"], first["return"]) == (0.5, None)
    assert (second["loss"], second["return"]) == (None, 20)
    assert (third["env_steps"], third["loss"], third["return"]) == (2**40, None, 21.0)
    assert 0 <= first["wall_seconds"] <= second["wall_seconds"] <= third["wall_seconds"]
    points = [(event.step, value.tag, value.simple_value) for event in events(run) for value in event.summary.value]
    assert points == [(100, "loss", 0.5), (200, "return", 20.0), (2**40, "return", 21.0)]


def test_a_resumed_run_repeats_no_step_and_its_time_goes_on(run: RunDirectory) -> None:
    with MetricsWriter(run) as writer:
        for env_steps in (100, 200, 300):
            writer.write(env_steps, {"loss": 1.0})
    earlier = lines(run)
    with MetricsWriter(run, began=time.monotonic() - 60) as writer:
        writer.truncate_after(200)
        assert lines(run) == earlier[:2]
        writer.write(300, {"loss": 2.0})
    assert lines(run)[:2] == earlier[:2]
    assert [(line["env_steps"], line["loss"]) for line in lines(run)[2:]] == [(300, 2.0)]
    assert lines(run)[2]["wall_seconds"] >= 60 + earlier[1]["wall_seconds"], "two runs' time"
    starts = [event.step for event in events(run) if event.HasField("session_log")]
    assert starts == [201], "TensorBoard drops what the first process wrote from there on"


def test_truncating_before_there_is_anything_is_fine(run: RunDirectory) -> None:
    with MetricsWriter(run) as writer:
        writer.truncate_after(0)
        writer.write(10, {"loss": 1.0})
    assert [line["env_steps"] for line in lines(run)] == [10]


def test_a_last_line_cut_off_by_a_crash_is_dropped(run: RunDirectory) -> None:
    run.metrics_path.write_text('{"env_steps": 1, "wall_seconds": 2.0}\n{"env_steps": 2, "wal')
    with MetricsWriter(run) as writer:
        writer.truncate_after(5)
        writer.write(2, {})
    assert [line["env_steps"] for line in lines(run)] == [1, 2]


@pytest.mark.parametrize("line", ["{", "7", '{"env_steps": "many"}', '{"env_steps": 1}'])
def test_a_broken_line_is_an_error_and_nothing_is_lost(run: RunDirectory, line: str) -> None:
    text = line + '\n{"env_steps": 2, "wall_seconds": 1}\n'
    run.metrics_path.write_text(text)
    with pytest.raises(ConfigError, match=r"line 1 of .*metrics\.jsonl"):
        MetricsWriter(run).truncate_after(5)
    assert run.metrics_path.read_text() == text


def test_closing_twice_or_without_a_record_is_fine(run: RunDirectory) -> None:
    writer = MetricsWriter(run)
    writer.close()
    writer.close()
    assert not run.metrics_path.exists()
    assert events(run) == []


def test_start_up_imports_neither_tensorboard_nor_orbax_nor_rich() -> None:
    code = """
import sys
from qfleet.runtime import cache, checkpoints, metrics, process, progress, run_directory, signals
heavy = {name.split(".")[0] for name in sys.modules} & {"tensorboardX", "orbax", "rich", "google", "platformdirs"}
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def full_after(num_bytes: int) -> Callable[[int, bytes], int]:
    """Returns `os.write` for a disk that takes only so many bytes more."""
    write, left = os.write, num_bytes

    def write_what_fits(descriptor: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[:left])
        left -= written
        return written

    return write_what_fits


def test_a_full_disk_costs_whole_records_and_one_warning(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsWriter(run) as writer:
        writer.write(1, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_after(10))
            writer.write(2, {"loss": 1.0})
            writer.write(3, {"loss": 1.0})
        writer.write(4, {"loss": 1.0})
    assert [line["env_steps"] for line in lines(run)] == [1, 4], "no line is cut off"
    assert [str(run.metrics_path) in record.getMessage() for record in caplog.records] == [True]


def test_tensorboard_that_can_not_write_is_switched_off_with_one_warning(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboardX.event_file_writer import EventsWriter

    def fail(self: Any, event: Any) -> None:
        if event.HasField("summary"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", fail)
    with MetricsWriter(run) as writer:
        for env_steps in range(5000):  # more than may wait
            writer.write(env_steps, {"loss": 1.0})
    assert len(lines(run)) == 5000
    (record,) = caplog.records
    assert "No space left" in record.getMessage() and "TensorBoard" in record.getMessage()


def test_a_file_system_that_does_not_answer_is_not_waited_for(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboardX.event_file_writer import EventsWriter

    answer = threading.Event()
    monkeypatch.setattr(loggers, "END_SECONDS", 0.01)
    monkeypatch.setattr(EventsWriter, "write_event", lambda self, event: event.HasField("summary") and answer.wait())
    writer = MetricsWriter(run)
    writer.write(1, {"loss": 1.0})
    writer.close()  # which would otherwise wait for ever
    assert "0.01 s" in caplog.text
    answer.set()
    for thread in threading.enumerate():
        if thread.name == "qfleet-tensorboard":
            thread.join()


def test_a_file_that_can_not_be_rewritten_is_an_error_and_nothing_is_left_behind(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricsWriter(run) as writer:
        writer.write(1, {"loss": 1.0})

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(run.path.iterdir())
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match=f"No space left on device in {run.path}; free space"):
        MetricsWriter(run).truncate_after(1)
    assert sorted(run.path.iterdir()) == before
