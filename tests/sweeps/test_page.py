"""sweep.html draws its figures in a browser, and asks no network for anything."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium

from qfleet.config import TrainConfig
from qfleet.runtime.report.page import render
from qfleet.sweeps.directory import SweepDirectory, SweepPlan
from qfleet.sweeps.page import sweep_data
from qfleet.sweeps.records import TrialRecord, best_first
from qfleet.sweeps.space import Choices, Parameter, Range

SPACE: list[Parameter] = [
    Range("learning_rate", 1e-4, 1e-2, is_log=True, is_whole=False),
    Choices("double", {"yes": True, "no": False}),
]


def record(number: int, state: str, rate: float, value: float | None) -> TrialRecord:
    settings, texts = {"learning_rate": rate, "double": True}, {"learning_rate": f"{rate:g}", "double": "yes"}
    return TrialRecord(number, state, settings, texts, value, "no memory" if state == "failed" else "")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[SweepDirectory]:
    plan = SweepPlan(TrainConfig(env="CartPole-v1"), {"learning_rate": "1e-4..1e-2:log"}, 4, True, "")
    made = SweepDirectory.create_or_open(tmp_path / "sweep", plan)
    yield made
    made.release()


def data_of(directory: SweepDirectory, **importances: float) -> dict[str, Any]:
    trials = [record(0, "complete", 1e-4, 10.0), record(1, "complete", 1e-3, 30.0)]
    trials += [record(2, "pruned", 1e-2, 5.0), record(3, "failed", 5e-3, None)]
    return sweep_data(directory, SPACE, best_first(trials), importances)


def test_positions_follow_scale_and_order(directory: SweepDirectory) -> None:
    parallel, values = data_of(directory)["figures"]
    best, other = parallel["lines"]
    assert best["name"] == "trial 1" and best["share"] > other["share"]
    assert best["y"] == pytest.approx([0.5, 0.25, 1.0]) and other["y"] == pytest.approx([0.0, 0.25, 0.0])
    ticks = parallel["coordinates"][0]["ticks"]
    assert [text for _, text in ticks] == ["0.0001", "0.001", "0.01"]
    assert [position for position, _ in ticks] == pytest.approx([0.0, 0.5, 1.0])
    assert values["traces"][1]["data"]["trials"] == {"x": [0, 1], "y": [10.0, 30.0]}


def test_the_page_says_what_is_missing(directory: SweepDirectory) -> None:
    notes = data_of(directory)["facts"]["notes"]
    assert "isn't shown" in notes[-1] and "Pruned trials were stopped" in notes[1]
    assert not any("isn't shown" in note for note in data_of(directory, double=0.6)["facts"]["notes"])


def test_a_browser_draws_all_figures(directory: SweepDirectory) -> None:
    page = directory.page_path
    page.write_text(render(data_of(directory, learning_rate=0.7, double=0.3)))
    with chromium() as browser:
        visit = Visit(browser, page.as_uri())
        assert visit.errors == [] and visit.addresses_asked == [page.as_uri()]
        assert visit.page.get_attribute("html", "data-drawn") == "3"
        assert visit.num_figures == 3
