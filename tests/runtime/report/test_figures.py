"""The figures of a report: which there are, what they hold, and how many points they take."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run

from qfleet.config import AgentConfig
from qfleet.runtime.comparison import Comparison
from qfleet.runtime.report.figures import MAX_POINTS, MIN_POINTS, make_figures, thinned, time_spent
from qfleet.runtime.saved_run import SavedRun


def figures_of(*runs: SavedRun) -> dict[str, dict[str, Any]]:
    return {figure["id"]: figure for figure in make_figures(Comparison(runs))}


def test_a_run_has_a_figure_for_each_metric_that_it_has(tmp_path: Path) -> None:
    figures = figures_of(make_run(tmp_path / "a", metrics={"fleet_chunks_per_second": 7.0, "num_env_failures": 0}))
    assert list(figures) == [
        *("returns", "values", "td_error", "loss", "exploration", "env_speed", "time", "other_fleet_chunks_per_second")
    ]
    evaluation, training = figures["returns"]["traces"]
    assert evaluation["data"]["env_steps"] == {"x": [500, 1000, 1500, 2000], "y": [5, 10, 15, 20]}
    assert evaluation["data"]["wall_seconds"]["x"] == [5, 10, 15, 20]
    assert (training["style"], len(training["data"]["env_steps"]["x"])) == ("faint", 10)


def test_several_seeds_have_a_band_and_lines_of_their_own(tmp_path: Path) -> None:
    traces = figures_of(*(make_run(tmp_path / str(seed), seed=seed) for seed in range(3)))["returns"]["traces"]
    assert [trace["style"] for trace in traces] == ["seed", "seed", "seed", "band", "line"]
    band, middle = traces[3:]
    assert "median, interquartile range of 3 seeds" in band["name"]
    assert middle["data"]["env_steps"] == {"x": [500, 1000, 1500, 2000], "y": [6, 11, 16, 21]}
    assert band["data"]["env_steps"]["low"] == [5.5, 10.5, 15.5, 20.5]


def test_groups_have_colours_of_their_own(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", agent=AgentConfig(n_step=3)),
        make_run(tmp_path / "c", seed=1),
    ]
    traces = figures_of(*runs)["returns"]["traces"]
    lines = {trace["name"]: trace["colour"] for trace in traces if trace["style"] == "line"}
    assert lines == {"n_step 1 (2 seeds)": 0, "n_step 3": 1}


def test_failures_are_added_up_over_time(tmp_path: Path) -> None:
    (trace,) = figures_of(make_run(tmp_path / "a", 3, metrics={"num_env_failures": 2}))["failures"]["traces"]
    assert trace["data"]["wall_seconds"] == {"x": [1, 2, 3], "y": [2, 4, 6]}


def test_the_parts_of_a_step_are_stacked(tmp_path: Path) -> None:
    shares = {"time_share_act": 0.25, "time_share_learn": 0.75}
    traces = figures_of(make_run(tmp_path / "a", 3, metrics=shares))["time_shares"]["traces"]
    assert [(trace["name"], trace["style"], trace["data"]["env_steps"]["y"][0]) for trace in traces] == [
        ("act", "area", 0.25),
        ("learn", "area", 0.75),
    ]


def test_the_time_of_a_run_is_divided_into_three(tmp_path: Path) -> None:
    # Each record tells of 100 steps at 200 steps/s, and there is one a second.
    spent = time_spent(make_run(tmp_path / "a", 10).metrics)
    assert spent == {"start and compilation": 0.5, "training": 5.0, "evaluations and checkpoints": 4.5}


def test_a_run_without_records_has_no_figures(tmp_path: Path) -> None:
    assert figures_of(make_run(tmp_path / "a", 0)) == {}


def test_a_thinned_curve_keeps_its_mean_and_its_end() -> None:
    x, y = np.arange(10_007.0), np.random.default_rng(0).normal(size=10_007)
    xs, ys = thinned(x, y, 100)
    assert len(xs) == len(ys) == 100 and xs[-1] == x[-1]
    edges = np.linspace(0, 10_007, 101).astype(int)
    np.testing.assert_allclose(np.average(ys, weights=np.diff(edges)), y.mean(), atol=1e-12)
    same, _ = thinned(x[:100], y[:100], 100)
    assert same is x[:100] or np.array_equal(same, x[:100])


@pytest.mark.parametrize("num_runs", [1, 20])
def test_curves_share_the_points_of_a_figure(tmp_path: Path, num_runs: int) -> None:
    runs = [make_run(tmp_path / str(seed), 1_500, seed=seed) for seed in range(num_runs)]
    traces = figures_of(*runs)["loss"]["traces"]
    points = [len(trace["data"]["env_steps"]["x"]) for trace in traces]
    assert max(points) <= max(MAX_POINTS // num_runs, MIN_POINTS)


def test_staleness_has_a_figure_only_where_there_is_any(tmp_path: Path) -> None:
    metrics = {"staleness": 2.5, "fleet_restarts": 0.0}
    assert "staleness" not in figures_of(make_run(tmp_path / "none", 5))
    figures = figures_of(make_run(tmp_path / "some", 5, metrics))
    assert figures["staleness"]["traces"][0]["data"]["env_steps"]["y"] == [2.5] * 5
    assert "failures" not in figures and "other_fleet_restarts" not in figures
