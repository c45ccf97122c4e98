"""Metrics read back: what was written, by column; damaged lines are named and left out."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from qfleet.config import ConfigError, TrainConfig
from qfleet.runtime.metrics import MetricsWriter
from qfleet.runtime.metrics_reading import MAX_COLUMNS, MAX_DAMAGED_NAMED, MetricsReader
from qfleet.runtime.run_directory import RunDirectory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def record(env_steps: int, **values: float | None) -> str:
    return json.dumps({"env_steps": env_steps, "wall_seconds": env_steps / 100, **values}) + "\n"


def test_what_a_run_has_written_comes_back_by_column(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", TrainConfig(env="CartPole-v1"))
    with MetricsWriter(run) as writer:
        writer.write(100, {"loss": None, "q_mean": 1.5})
        writer.write(2**40, {"loss": 0.25, "q_mean": math.inf, "late": 3.0})
    metrics = MetricsReader(run.metrics_path).read()
    assert metrics["env_steps"].tolist() == [100, 2**40] and metrics["env_steps"].dtype == np.int64
    np.testing.assert_array_equal(metrics["loss"], [math.nan, 0.25])
    np.testing.assert_array_equal(metrics["q_mean"], [1.5, math.nan])
    np.testing.assert_array_equal(metrics["late"], [math.nan, 3.0])
    assert (metrics.num_records, metrics.num_damaged, len(metrics["wall_seconds"])) == (2, 0, 2)


def test_pandas_makes_a_table_of_it(file: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file.write_text(record(1, loss=0.5) + record(2))
    table = pandas.DataFrame(MetricsReader(file).read())
    assert list(table.columns) == ["env_steps", "wall_seconds", "loss"] and table["loss"][0] == 0.5


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "strict JSON"),
        (b"[" * 100_000, "strict JSON"),
        (b"[1]", "an object of numbers"),
        (b'{"env_steps": 1, "wall_seconds": 1, "loss": "low"}', "an object of numbers"),
        (b'{"env_steps": 1, "wall_seconds": 1, "loss": [1]}', "an object of numbers"),
        (b'{"env_steps": 1, "wall_seconds": true}', "an object of numbers"),
        (b'{"env_steps": 1.5, "wall_seconds": 1}', "env_steps and wall_seconds"),
        (b'{"env_steps": 9223372036854775808, "wall_seconds": 1}', "env_steps and wall_seconds"),
        (b'{"env_steps": 1, "wall_seconds": null}', "env_steps and wall_seconds"),
        (b'{"env_steps": 1, "wall_seconds": 1, "loss": 1' + b"0" * 400 + b"}", "64 bits"),
        (b'{"env_steps": 1, "wall_seconds": 1, "loss": 1' + b"0" * 5000 + b"}", "strict JSON"),
        (record(1, **dict.fromkeys(map(str, range(MAX_COLUMNS)))).strip().encode(), "at most"),
        (b"\xff\xfe\x00", "strict JSON"),
        (b"", "strict JSON"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_and_left_out(file: Path, line: bytes, problem: str) -> None:
    file.write_bytes(record(1).encode() + line + b"\n" + record(3).encode())
    metrics = MetricsReader(file).read()
    assert metrics["env_steps"].tolist() == [1, 3]
    (damage,) = metrics.damaged
    assert damage.startswith("line 2: ") and problem.removeprefix("an ") in damage and len(damage) < 200


def test_many_damaged_lines_are_counted_and_a_few_are_named(file: Path) -> None:
    file.write_text("?\n" * 1000 + record(1))
    metrics = MetricsReader(file).read()
    assert (metrics.num_records, metrics.num_damaged, len(metrics.damaged)) == (1, 1000, MAX_DAMAGED_NAMED)


def test_a_line_that_is_being_written_is_left_out_without_a_word(file: Path) -> None:
    file.write_text(record(1) + record(2)[:-9])
    metrics = MetricsReader(file).read()
    assert (metrics.num_records, metrics.num_damaged) == (1, 0)


def test_no_file_means_no_records(file: Path) -> None:
    metrics = MetricsReader(file).read()
    assert metrics.num_records == 0 and set(metrics) == {"env_steps", "wall_seconds"}


def test_a_file_of_another_kind_is_one_clear_error(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=r"metrics.jsonl must be a readable file, got .* a named pipe"):
        MetricsReader(file).read()


def test_only_what_was_appended_is_read_later(file: Path) -> None:
    reader = MetricsReader(file)
    assert reader.read().num_records == 0
    file.write_text(record(1, loss=0.5) + "?\n" + record(2)[:5])
    assert reader.read().num_records == 1
    with file.open("r+") as opened:
        opened.write(" " * len(record(1, loss=0.5)))  # which a reader that begins anew would trip over
        opened.seek(0, os.SEEK_END)
        opened.write(record(2)[5:] + record(3, late=1.0))
    metrics = reader.read()
    assert metrics["env_steps"].tolist() == [1, 2, 3] and metrics.num_damaged == 1
    np.testing.assert_array_equal(metrics["loss"], [0.5, math.nan, math.nan])
    np.testing.assert_array_equal(metrics["late"], [math.nan, math.nan, 1.0])


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_file_that_went_back_is_read_anew(file: Path, is_replaced: bool) -> None:
    file.write_text(record(1) + record(2) + record(3))
    reader = MetricsReader(file)
    assert reader.read().num_records == 3
    if is_replaced:
        other = file.with_name("other")
        other.write_text(record(1) + record(5) + record(6) + record(7))
        other.replace(file)
        assert reader.read()["env_steps"].tolist() == [1, 5, 6, 7]
    else:
        file.write_text(record(1))
        assert reader.read()["env_steps"].tolist() == [1]
