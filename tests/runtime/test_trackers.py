"""Trackers: the real packages, in their offline modes, keep what a run logs; one that can't costs a warning."""

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qfleet.config import ConfigError
from qfleet.runtime.loggers import LoggedRun, Loggers
from qfleet.runtime.trackers import make_loggers

RUN_ID = 16 * "a"


def log_a_run(tracker: str, path: Path, *steps: int, stopped: str = "env steps") -> None:
    config = {"env": "CartPole-v1", "agent": {"discount": 0.99, "hidden_sizes": [128, 128]}}
    loggers = Loggers(LoggedRun(path, RUN_ID, config, None), make_loggers([tracker]))
    for env_steps in steps:
        loggers.write(env_steps, {"loss": 1.0 / env_steps, "eval_return_mean": 500.0})
    loggers.end({"stopped": stopped, "env_steps": steps[-1]})


def wandb_records(file: Path) -> Iterator[Any]:
    """Yields the records of an offline run, which are in blocks of 32 KiB as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def test_wandb_keeps_what_a_run_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with caplog.at_level(logging.WARNING, "qfleet"):
        log_a_run("wandb", tmp_path, 64, 128)
    assert caplog.records == []
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{RUN_ID}.wandb")
    records = list(wandb_records(file))
    (begun,) = (record.run for record in records if record.HasField("run"))
    assert (begun.run_id, begun.project, begun.display_name) == (RUN_ID, "qfleet", tmp_path.name)
    assert {item.key: item.value_json for item in begun.config.update}["env"] == '"CartPole-v1"'
    history = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(int(line["_step"]), float(line["loss"])) for line in history] == [(64, 1 / 64), (128, 1 / 128)]


def test_wandb_without_a_key_costs_a_warning_and_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING, "qfleet"):
        log_a_run("wandb", tmp_path, 64)
    (record,) = caplog.records
    assert "wandb can't log" in record.getMessage() and "WANDB_MODE=offline" in record.getMessage()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy and MLflow
def test_mlflow_keeps_what_a_run_logs_and_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("sqlalchemy", reason="needs the extra mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(store)
    try:
        log_a_run("mlflow", tmp_path, 64, 128, stopped="interrupted")
        log_a_run("mlflow", tmp_path, 192)
    finally:
        mlflow.set_tracking_uri(None)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("qfleet").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params["agent.discount"] == "0.99"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (64, 1 / 64), (128, 1 / 128), (192, 1 / 192)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_without_its_server_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        with caplog.at_level(logging.WARNING, "qfleet"):
            log_a_run("mlflow", tmp_path, 64)
    finally:
        mlflow.set_tracking_uri(None)
    (record,) = (record for record in caplog.records if record.name == "qfleet")
    assert "mlflow can't log the run any more; the run goes on" in record.getMessage()


def test_a_tracker_is_named_once() -> None:
    with pytest.raises(ConfigError, match="each tracker must be named once, got wandb twice"):
        make_loggers(["wandb", "wandb"])
