"""`qfleet diagnose`: a table that reads well at 80 columns, and one line of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import AgentConfig, FusedConfig, TrainConfig
from qfleet.runtime.run_directory import RunDirectory


def make_run(path: Path, *lines: dict[str, Any], **agent: Any) -> str:
    """Makes a run of 8 lanes, with these records."""
    config = TrainConfig(env="CartPole-v1", agent=AgentConfig(**agent), topology=FusedConfig(num_envs=8))
    run = RunDirectory.create(str(path), config)
    run.metrics_path.write_text("".join(json.dumps({"wall_seconds": 1.0, **line}) + "\n" for line in lines))
    return str(run.path)


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    """A run whose replay is too small, and whose learning rate is too high."""
    record = {"episode_return_mean": 20.0, "episode_length_mean": 20.0, "num_episodes": 100, "eval_return_mean": 20.0}
    records = [
        {**record, "env_steps": 10_000 * i, "learner_steps": 1_000 * i, "update_ratio": 0.5} for i in range(1, 4)
    ]
    return make_run(tmp_path / "faulty", *records, replay_capacity=128)


def test_each_finding_has_its_figure_threshold_source_and_knob(faulty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", faulty]) == 0
    text = capsys.readouterr().out
    assert text.startswith("CartPole-v1 with custom, 30,000 environment steps\n\n1. small_replay (medium)\n")
    assert "2. learning_rate (high)" in text
    assert "figure  500, threshold" in text
    assert "source  measured: benchmarks/diagnose.py" in text
    assert "change  learning_rate (now 0.001) down" in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_has_the_same_findings_as_the_function(faulty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", faulty, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    findings = qfleet.diagnose(faulty)
    assert said["run"] == faulty
    assert [each["name"] for each in said["findings"]] == [each.name for each in findings]
    assert [each.name for each in findings] == ["small_replay", "learning_rate"]
    assert set(said["findings"][0]) == {"name", "sentence", "figure", "threshold", "source", "knob", "severity"}
    assert qfleet.diagnose(qfleet.open_run(faulty)) == findings


def test_a_run_without_records_and_without_faults_is_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "new")
    assert main(["diagnose", run]) == 0
    assert capsys.readouterr().out.endswith("0 environment steps\nnothing is wrong, as far as its metrics tell\n")


def test_damaged_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "damaged", {"env_steps": 10})
    with (Path(run) / "metrics.jsonl").open("a") as file:
        file.write("not JSON\n")
    assert main(["diagnose", run]) == 0
    assert "without 1 damaged line of metrics.jsonl" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
