"""The picture of all topologies: each seed has a line of its own, and the kept returns give the same picture again."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def topologies() -> Any:
    """The benchmark, under another name than the folder of tests has."""
    spec = importlib.util.spec_from_file_location("benchmark_of_topologies", BENCHMARKS / "topologies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec.loader.exec_module(module)
    return module


RUNS = {
    "fused": [[(0, 20.0), (100, 500.0)], [(0, 10.0), (100, 400.0)]],
    "gossip": [[(0, 30.0), (100, 90.0)], [(0, 9.0), (50, 0.0), (100, 300.0)]],
}


def test_each_seed_has_a_line_and_redrawing_gives_the_same_picture(
    topologies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topologies.draw(RUNS, tmp_path / "first.svg")
    picture = (tmp_path / "first.svg").read_text()
    for name in RUNS:
        assert picture.count(f">{name}<") == 1
    lines = re.findall(r'd="[^"]*" clip-path="[^"]*" style="fill: none; stroke: (#\w+)', picture)
    assert (lines.count("#1f77b4"), lines.count("#ff7f0e"), lines.count("#cccccc")) == (2, 2, 2)
    (tmp_path / "again.json").write_text(json.dumps(RUNS))
    monkeypatch.setattr(sys, "argv", ["topologies.py", "--redraw", "--plot", str(tmp_path / "again.svg")])
    topologies.main()
    assert (tmp_path / "again.svg").read_text() == picture


def test_a_return_of_zero_is_a_point(topologies: Any) -> None:
    records = [{"env_steps": step, "eval_return_mean": mean} for step, mean in ((1, None), (2, 0.0), (3, 5.0))]
    assert topologies.points_of(records) == [(2, 0.0), (3, 5.0)]
