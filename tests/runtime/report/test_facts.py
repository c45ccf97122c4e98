"""What a report says in words: outcome, settings, warnings. Nothing that a file holds can break it."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run

from qfleet.config import AgentConfig
from qfleet.runtime.comparison import Comparison
from qfleet.runtime.report.facts import make_facts
from qfleet.runtime.saved_run import SavedRun


def facts_of(*runs: SavedRun) -> dict[str, Any]:
    return make_facts(Comparison(runs))


def test_one_run_is_told_by_its_key_figures(tmp_path: Path) -> None:
    facts = facts_of(make_run(tmp_path / "a", preset="double_dqn"))
    assert (facts["title"], facts["state"]) == ("CartPole-v1 · double_dqn · fused", "stopped: env steps")
    assert dict(facts["cards"]) == {
        "newest return": "20",
        "best return, at step 1,500": "25.5",
        "environment steps": "2,000",
        "learner steps": "200",
        "wall time": "1 min 15 s",
        "environment steps/s": "200",
    }
    assert dict(facts["settings"])["agent.discount"] == "0.99" and facts["differences"] == []


def test_a_run_that_was_resumed_is_under_way_again_once_it_has_come_further(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.directory.write_summary({"stopped": "failed", "error": "no power", "env_steps": 2000, "eval_return_mean": 5.0})
    assert facts_of(SavedRun(run.path))["state"] == "stopped: failed"
    with run.directory.metrics_path.open("a") as file:
        file.write(json.dumps({"env_steps": 2100, "wall_seconds": 21.0, "eval_return_mean": 30.0}) + "\n")
    facts = facts_of(again := SavedRun(run.path))
    assert (facts["state"], facts["notes"]) == ("under way, or killed before its end", [])
    assert dict(facts["cards"]).items() >= {"newest return": "30", "environment steps": "2,100"}.items()
    assert Comparison([again]).table()[0]["stopped"] is None and again.summary["stopped"] == "failed"


def test_groups_are_compared_with_their_intervals(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", seed=seed) for seed in range(5)]
    facts = facts_of(*runs, make_run(tmp_path / "b", agent=AgentConfig(n_step=3)))
    first, second = facts["groups"]
    assert (first["seeds"], first["newest return"], first["what"]) == ("5", "22", "IQM, 95 % interval")
    assert (second["seeds"], second["newest return"], second["what"]) == ("1", "20", "one seed")
    assert facts["differences"] == [{"setting": "agent.n_step", "n_step 1": "1", "n_step 3": "3"}]
    assert [row["seed"] for row in facts["runs"]] == ["0", "1", "2", "3", "4", "0"]
    assert facts["subtitle"] == "6 runs in 2 groups"


def test_what_a_reader_must_know_comes_as_notes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 2)
    run.directory.write_summary({"error": "the disk burned", "warnings": ["the values have diverged"]})
    with run.directory.metrics_path.open("a") as file:
        file.write("?\n")
    assert facts_of(SavedRun(run.path))["notes"] == [
        "the disk burned",
        "the values have diverged",
        "metrics.jsonl, line 3: a record must be strict JSON, got ?; the line is left out",
    ]


@pytest.mark.parametrize("summary", [
    {"stopped": [1], "warnings": "w", "best_eval_at_env_steps": "many", "best_eval_return_mean": 1, "num_restarts": {}},
    {"eval_return_mean": True, "wall_seconds": 10**400, "env_steps": None, "num_env_failures": "2", "error": 5},
    {},
])  # fmt: skip
def test_a_summary_of_odd_types_breaks_nothing(tmp_path: Path, summary: dict[str, Any]) -> None:
    run = make_run(tmp_path / "a", 3)
    run.directory.summary_path.write_text(json.dumps(summary))
    json.dumps(facts_of(SavedRun(run.path)), allow_nan=False)
    json.dumps(facts_of(SavedRun(run.path), make_run(tmp_path / "b")), allow_nan=False)


def test_a_run_under_way_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 3)
    run.directory.summary_path.unlink()
    assert facts_of(SavedRun(run.path))["state"] == "under way, or killed before its end"
