"""Shared by the benchmarks: runs in processes of their own, one table, and one JSON line per result."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qfleet

HERE = Path(__file__).resolve().parent


def train(directory: Path, env: str, *flags: str, cache: Path | None = None) -> dict[str, Any]:
    """Runs `qfleet train` in a process of its own, into `directory`, and returns its summary.

    Args:
      cache: folder of compiled programs. The default is the user's own.
    """
    command = [sys.executable, "-m", "qfleet", "train", env, "--run-dir", str(directory), "--quiet", *flags]
    variables = os.environ | ({"QFLEET_CACHE_DIR": str(cache)} if cache else {})
    subprocess.run(command, env=variables, check=True)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


def seconds_since_process_start(summary: dict[str, Any]) -> float:
    """Returns the wall time of a run, counted from the start of the process that ran it."""
    return float(summary["process_age_seconds"] + summary["wall_seconds"])


def env_steps_per_second(config: qfleet.TrainConfig, warmup_env_steps: int) -> float:
    """Trains in this process, into a temporary folder, and returns our speed after the warm-up."""
    with scratch() as folder:
        steps, seconds = 0, 0.0
        for progress in qfleet.iterate(dataclasses.replace(config, run_dir=str(Path(folder) / "run"))):
            if progress.env_steps > warmup_env_steps:
                steps, seconds = steps + progress.new_env_steps, seconds + progress.train_seconds
        return steps / seconds


def peer(python: str, script: str, *arguments: str) -> dict[str, Any]:
    """Runs a script of `peers/` with the peers' own Python and returns the JSON of its last line."""
    command = [python, str(HERE / "peers" / script), *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def report(benchmark: str, results: Sequence[dict[str, Any]]) -> None:
    """Prints results, which have the same fields, as a table and as JSON lines."""
    print_table(results)
    for result in results:
        print(json.dumps({"benchmark": benchmark, **result}))


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Prints results, which have the same fields, as one row each."""
    rows = [[_cell(value) for value in result.values()] for result in results]
    names = list(results[0])
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Returns a temporary folder for runs."""
    return tempfile.TemporaryDirectory(prefix="qfleet-benchmark-")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
