"""Runs side by side: groups of the same settings, their differences, and curves with bands."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qfleet
from qfleet.config import AgentConfig, ConfigError, OverlappedConfig, TrainConfig
from qfleet.runtime.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(name: str, returns: list[float], **settings: Any) -> Path:
    """Makes a run with an evaluation after every 100 environment steps."""
    run = RunDirectory.create(name, TrainConfig(env="CartPole-v1", **settings))
    lines = [
        {"env_steps": 100 * i, "wall_seconds": 2.0 * i, "eval_return_mean": value} for i, value in enumerate(returns, 1)
    ]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run.path


def test_runs_that_differ_only_in_their_seeds_form_a_group() -> None:
    slow = AgentConfig(learning_rate=1e-5)
    paths = [make_run(f"a{seed}", [1.0, 2.0 + seed], seed=seed, checkpoints_kept=seed + 1) for seed in range(3)]
    comparison = qfleet.compare([*paths, make_run("b", [5.0], agent=slow)])
    fast, other = comparison.groups
    assert (len(fast.runs), fast.num_seeds, len(other.runs)) == (3, 3, 1)
    assert comparison.differences == {"agent.learning_rate": [AgentConfig().learning_rate, 1e-5]}
    assert other.label == "learning_rate 1e-05"
    assert fast.final_returns.tolist() == [2.0, 3.0, 4.0]
    assert [row["run"] for row in comparison.table()] == ["a0", "a1", "a2", "b"]


def test_a_run_under_way_has_the_figures_of_its_newest_records() -> None:
    going, begun = make_run("going", [1.0, 2.0]), make_run("begun", [])
    with (going / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"env_steps": 250, "wall_seconds": 5.0, "env_steps_per_second": 50.0}) + "\n")
    first, second = qfleet.compare([going, begun]).table()
    names = ("stopped", "env_steps", "wall_seconds", "return_mean", "best_return_mean", "env_steps_per_second")
    assert [first[name] for name in names] == [None, 250, 5.0, 2.0, None, 50.0]
    assert [second[name] for name in names] == [None] * 6


def test_a_band_is_taken_where_all_seeds_have_a_curve() -> None:
    long, short = make_run("a", [0.0, 10.0, 20.0], seed=0), make_run("b", [4.0, 14.0], seed=1)
    (group,) = qfleet.compare([long, short]).groups
    x, band = group.band("eval_return_mean") or pytest.fail("no band")
    np.testing.assert_allclose(x, [100, 200])
    np.testing.assert_allclose(band.middle, [2, 12])
    seconds, _ = group.band("eval_return_mean", "wall_seconds") or pytest.fail("no band")
    np.testing.assert_allclose(seconds, [2, 4])
    assert group.band("no such metric") is None
    with pytest.raises(ConfigError, match="x must be env_steps or wall_seconds, got 'steps'"):
        group.curves("eval_return_mean", "steps")


def test_the_seeds_of_one_run_are_curves_of_their_own() -> None:
    run = RunDirectory.create("run", TrainConfig(env="CartPole-v1", num_seeds=2, seed=7))
    values = {"eval_return_mean": 2.0, "eval_return_mean_seed_0": 1.0, "eval_return_mean_seed_1": 3.0, "loss": 0.5}
    run.metrics_path.write_text(json.dumps({"env_steps": 10, "wall_seconds": 1, **values}) + "\n")
    (group,) = qfleet.compare(["run"]).groups
    assert [(curve.label, curve.y.tolist()) for curve in group.curves("eval_return_mean")] == [
        ("seed 7", [1.0]),
        ("seed 8", [3.0]),
    ]
    assert [(curve.label, curve.y.tolist()) for curve in group.curves("loss")] == [("mean of seeds", [0.5])]


def test_groups_are_named_by_preset_and_topology_if_these_tell_them_apart() -> None:
    settings: list[dict[str, Any]] = [
        {"preset": "dqn"},
        {"preset": "pqn"},
        {"preset": "pqn", "topology": OverlappedConfig()},
    ]
    runs = [make_run(str(i), [1.0], **each) for i, each in enumerate(settings)]
    assert [group.label for group in qfleet.compare(runs).groups] == ["dqn, fused", "pqn, fused", "pqn, overlapped"]
    assert [group.label for group in qfleet.compare(runs[:1]).groups] == ["CartPole-v1, dqn"]


def test_groups_that_differ_in_much_are_named_by_their_folders() -> None:
    agents = [
        AgentConfig(learning_rate=0.1**i, batch_size=32 * i, n_step=i, replay_capacity=10_000 * i) for i in (1, 2)
    ]
    runs = [make_run(f"run-{i}", [1.0], agent=agent) for i, agent in enumerate(agents)]
    assert [group.label for group in qfleet.compare(runs).groups] == ["run-0", "run-1"]


def test_a_run_is_found_by_what_a_user_calls_it() -> None:
    path = make_run("runs/CartPole-v1-dqn", [1.0, 2.0])
    assert qfleet.read_metrics("latest")["eval_return_mean"].tolist() == [1.0, 2.0]
    run = qfleet.open_run("CartPole")
    assert (run.path, run.config.env, run.summary, run.environment, run.videos) == (path, "CartPole-v1", {}, [], [])
    with pytest.raises(ConfigError, match=r"a run is a folder with a config.json, got nowhere"):
        qfleet.open_run("nowhere")


def test_what_is_no_list_of_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a list of runs, got 'a'; put it into a list"):
        qfleet.compare("a")
    with pytest.raises(ConfigError, match="must name at least one run"):
        qfleet.compare([])


def test_videos_are_files_and_nothing_else(tmp_path: Path) -> None:
    run = qfleet.open_run(make_run("a", [1.0]))
    run.directory.videos_path.mkdir()
    (run.directory.videos_path / "1.mp4").write_bytes(b"")
    (run.directory.videos_path / "2.mp4").symlink_to(tmp_path / "secret")
    (run.directory.videos_path / "3.mp4").mkdir()
    assert [file.name for file in run.videos] == ["1.mp4"]
    assert dataclasses.is_dataclass(run.config)


def test_a_notebook_shows_a_run_and_a_comparison() -> None:
    path = make_run("<b>", [1.0, 2.0])
    shown = qfleet.open_run(path)._repr_html_()
    assert "200 of 500,000 environment steps" in shown and "<svg" in shown and "<b>," not in shown
    table = qfleet.compare([path])._repr_html_()
    assert "<td>&lt;b&gt;</td>" in table and table.count("<tr>") == 2
