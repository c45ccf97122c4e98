"""Reports of large runs: how long they take to write, how much they weigh, and how soon a browser has drawn them.

python benchmarks/report.py

Compares a run with 100,000 records, as a long run of a fleet has, and 20 runs side by side. It wants Debian's chromium,
which Playwright starts without a window.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from playwright.sync_api import Page, sync_playwright

from qfleet.config import AgentConfig, TrainConfig
from qfleet.runtime.report.page import write_report
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.saved_run import SavedRun

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main() -> None:
    """Measures one large run, and many runs side by side."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=100_000, help="records of the large run")
    parser.add_argument("--runs", type=int, default=20, help="runs that are compared")
    parser.add_argument("--repeats", type=int, default=3, help="times that each page is opened; the median counts")
    arguments = parser.parse_args()
    with common.scratch() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        large = [make_run(Path(folder) / "large", arguments.records, 0)]
        many = [make_run(Path(folder) / str(i), 2_000, i) for i in range(arguments.runs)]
        common.report(
            "report",
            [
                measure(page, f"1 run, {arguments.records:,} records", large, arguments.repeats),
                measure(page, f"{arguments.runs} runs, 2,000 records each", many, arguments.repeats),
            ],
        )
        browser.close()


def make_run(path: Path, num_records: int, number: int) -> SavedRun:
    """Returns a run whose records have some thirty values each. Every fifth run has other settings."""
    agent = AgentConfig(n_step=1 + number // 5)
    run = RunDirectory.create(path, TrainConfig(env="CartPole-v1", agent=agent, seed=number))
    fleet = {f"fleet_figure_{i}": i for i in range(12)}
    with run.metrics_path.open("w") as file:
        for i in range(1, num_records + 1):
            wave = math.sin(i / 50 + number)
            record = {
                "env_steps": 100 * i, "wall_seconds": i / 10, "learner_steps": i, "num_episodes": 3,
                "episode_return_mean": 100 + wave, "episode_length_mean": 100 + wave, "q_mean": 10 + wave,
                "loss": 1 + wave / 2, "td_error_mean": 1 + wave / 3, "exploration": 1 / i, "staleness": 2 + wave,
                "num_env_failures": 0, "env_steps_per_second": 5_000 + wave, "learner_steps_per_second": 90 + wave,
                "eval_return_mean": 100 + 9 * wave if i % 10 == 0 else None,
                **{name: value + wave for name, value in fleet.items()},
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return SavedRun(path)


def measure(page: Page, name: str, runs: Sequence[SavedRun], repeats: int) -> dict[str, Any]:
    """Writes a report and opens it several times. The first time is left out, in which the browser starts."""
    started = time.perf_counter()
    file = write_report(runs, runs[0].path / "report.html")
    written = time.perf_counter() - started
    opened = [open_page(page, file) for _ in range(1 + repeats)][1:]
    figures = page.evaluate("document.documentElement.dataset.drawn")
    return {
        "report": name,
        "written_s": round(written, 2),
        "mb": round(file.stat().st_size / 1e6, 2),
        "opened_s": round(sorted(opened)[len(opened) // 2], 2),
        "figures": int(figures),
    }


def open_page(page: Page, file: Path) -> float:
    """Returns the seconds from the request for a page until all its figures are drawn."""
    started = time.perf_counter()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
