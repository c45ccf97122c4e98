"""Metrics: each step appears once, in JSON that any parser reads, and equally in TensorBoard."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qfleet.config import ConfigError, TrainConfig
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
    assert 0 < first["wall_seconds"] <= second["wall_seconds"] <= third["wall_seconds"]
    points = [(event.step, value.tag, value.simple_value) for event in events(run) for value in event.summary.value]
    assert points == [(100, "loss", 0.5), (200, "return", 20.0), (2**40, "return", 21.0)]


def test_a_resumed_run_repeats_no_step_and_its_time_goes_on(run: RunDirectory) -> None:
    with MetricsWriter(run) as writer:
        for env_steps in (100, 200, 300):
            writer.write(env_steps, {"loss": 1.0})
    earlier = lines(run)
    with MetricsWriter(run) as writer:
        writer.truncate_after(200)
        assert lines(run) == earlier[:2]
        writer.write(300, {"loss": 2.0})
    assert lines(run)[:2] == earlier[:2]
    assert [(line["env_steps"], line["loss"]) for line in lines(run)[2:]] == [(300, 2.0)]
    assert lines(run)[2]["wall_seconds"] > earlier[1]["wall_seconds"] + 0.5, "two processes' time"
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
