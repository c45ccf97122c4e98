"""The page of a report, in a real browser: everything is drawn, nothing is asked of the network, nothing runs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium
from made_runs import make_run

from qfleet.cli.main import main
from qfleet.config import AgentConfig, ConfigError
from qfleet.runtime.report.page import MAX_VIDEO_BYTES, render, report_data, write_report
from qfleet.runtime.saved_run import SavedRun

METRICS = {
    "eval_value_mean": 3.0,
    "eval_discounted_return_mean": 2.5,
    "num_env_failures": 1,
    "time_share_act": 0.4,
    "time_share_learn": 0.6,
    "fleet_chunks_per_second": 12.0,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_report_is_drawn_whole_without_a_network(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    run = make_run(tmp_path / "run", 200, METRICS)
    file = write_report([run], tmp_path / "report.html")
    visit = Visit(browser, file.as_uri(), width=width, scheme=scheme)
    visit.keep_screenshot(f"report-{width}-{scheme}")
    assert visit.errors == [] and visit.addresses_asked == [file.as_uri()]
    assert visit.num_figures == len(report_data([run])["figures"]) == 10
    assert visit.overflow == 0
    assert visit.page.title() == "CartPole-v1 · custom · fused"


def test_runs_are_compared_and_their_curves_drawn_against_time(browser: Any, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", 50, seed=seed) for seed in range(5)]
    runs.append(make_run(tmp_path / "b", 50, agent=AgentConfig(n_step=3)))
    visit = Visit(browser, write_report(runs, tmp_path / "report.html").as_uri(), width=390)
    visit.keep_screenshot("comparison-390")
    assert (visit.errors, visit.overflow) == ([], 0)
    assert visit.page.locator("#plot-returns .xtitle").text_content() == "Environment steps"
    visit.page.get_by_role("button", name="Wall time").click()
    visit.page.locator("#plot-returns .xtitle", has_text="Wall").wait_for()
    assert visit.errors == [] and visit.num_figures == len(report_data(runs)["figures"])
    assert "agent.n_step" in visit.page.locator("main").inner_text()


def test_names_from_a_folder_are_shown_and_never_run(browser: Any, tmp_path: Path) -> None:
    hostile = "</script><script>document.hacked = 1</script><img src=x onerror='document.hacked = 1'><!--"
    run = make_run(tmp_path / "run", 20, {hostile: 1.0}, preset=hostile)
    run.directory.write_summary({"stopped": hostile, "warnings": [hostile]})
    visit = Visit(browser, write_report([SavedRun(run.path)], tmp_path / "report.html").as_uri())
    assert visit.page.evaluate("document.hacked") is None and visit.errors == []
    assert hostile in visit.page.locator(".notes").inner_text()


def test_a_run_without_records_says_so(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, write_report([make_run(tmp_path / "run", 0)], tmp_path / "report.html").as_uri())
    assert visit.errors == [] and "no records to draw yet" in visit.page.locator("main").inner_text()


def test_the_newest_video_that_is_small_enough_is_in_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    run.directory.videos_path.mkdir()
    (run.directory.videos_path / "1.mp4").write_bytes(b"small")
    (run.directory.videos_path / "2.mp4").write_bytes(b"x" * (MAX_VIDEO_BYTES + 1))
    assert report_data([run])["video"] == "data:video/mp4;base64,c21hbGw="


def test_a_page_holds_strict_json_and_a_policy(tmp_path: Path) -> None:
    text = render(report_data([make_run(tmp_path / "run", 10, {"odd": float("nan")})]))
    data = text.split('id="data">')[1].split("</script>")[0]
    json.loads(data, parse_constant=pytest.fail)
    assert "default-src &#x27;none&#x27;" in text and "http-equiv" in text


def test_the_command_writes_into_the_run_or_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a")), make_run(Path("runs/b"), seed=1)
    assert main(["report", "runs/a"]) == 0 and Path("runs/a/report.html").exists()
    assert main(["report", "runs/a", "b"]) == 0 and Path("report.html").exists()
    assert main(["report", "latest", "--out", "own.html"]) == 0 and Path("own.html").exists()
    assert "report: own.html\n" in capsys.readouterr().out


def test_a_report_replaces_an_older_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a")), make_run(Path("runs/b"), seed=1)
    for name in ("new.html", "new.html", "empty.html"):
        Path("empty.html").touch()
        assert main(["report", "a", "--out", name]) == 0
    Path("report.html").write_text("<!doctype html>\nmine")
    Path("thesis.tex").write_text("mine")
    Path("link.html").symlink_to("thesis.tex")
    os.mkfifo("pipe.html")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("runs/a/config.json", "thesis.tex", "link.html", "pipe.html", "runs"):
        assert main(["report", "a", "--out", name]) == 2
        assert f"an older report, got {name}, which is something else" in capsys.readouterr().err
    assert main(["report", "a", "b"]) == 2  # by default it would be report.html
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report"]) == 2
    errors = capsys.readouterr().err
    assert "a run is a folder with a config.json" in errors and "RUN must name at least one run" in errors
    with pytest.raises(ConfigError, match="a report must be a file that can be written, got .* give another --out"):
        write_report([make_run(tmp_path / "run", 1)], tmp_path / "no" / "report.html")


def test_a_report_of_one_run_shows_what_may_be_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 20, {"dead_units_fraction": 0.95})
    (finding,) = report_data([run])["findings"]
    assert (finding["name"], finding["figure"]) == ("dead_units", "0.95")
    assert all(isinstance(text, str) and text for text in finding.values())
    assert report_data([run, run])["findings"] == []
