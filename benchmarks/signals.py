"""Signals at random moments of a run: how soon it stops, with which exit code, and whether it can be resumed.

python benchmarks/signals.py --tries 100

Each try starts `qfleet train` with an empty cache of compiled programs, so that compilation takes most of the time, or
with a full one (`--warm`), so that training and evaluations do. A signal goes to the run's whole process group, as from
Ctrl-C, `timeout` or a batch system, at a moment between the making of the run's folder and the end of an undisturbed
run.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

import qfleet

LIMIT_SECONDS = 10.0
"""The longest that a run may take to stop."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

RUNS = {
    "in-graph": ("CartPole-v1", "rainbow_lite", "--eval-episodes=100"),
    "host": ("gym:CartPole-v1", "double_dqn", "--num-envs=4"),
    "workers": ("gym:CartPole-v1", "double_dqn", "--num-envs=4", "--num-env-workers=2"),
}
"""The runs that are stopped: environment, preset and flags."""


def main() -> None:
    """Makes the tries and prints a row for each, then one JSON line for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--env-steps", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    with common.scratch() as folder:
        results = attempts(arguments, Path(folder) if arguments.warm else None)
    common.print_table(results)
    seconds = [result["seconds_to_stop"] for result in results]
    summary = {
        "benchmark": "signals",
        "cache": "warm" if arguments.warm else "cold",
        "tries": len(results),
        "clean": sum(result["is_clean"] for result in results),
        "seconds_to_stop_median": round(statistics.median(seconds), 2),
        "seconds_to_stop_max": max(seconds),
    }
    print(json.dumps(summary))


def attempts(arguments: argparse.Namespace, cache: Path | None) -> list[dict[str, Any]]:
    """Returns the results of all tries; each is printed as soon as it is there."""
    rng, env_steps = random.Random(arguments.seed), arguments.env_steps
    if cache:
        for name in RUNS:
            undisturbed_seconds(name, env_steps, cache)  # fills it
    spans = {name: undisturbed_seconds(name, env_steps, cache) for name in RUNS}
    results = []
    for i in range(arguments.tries):
        name = list(RUNS)[i % len(RUNS)]
        number = SIGNALS[i // len(RUNS) % len(SIGNALS)]
        results.append({"try": i, **attempt(name, number, rng.uniform(0, spans[name]), env_steps, cache)})
        print(results[-1], flush=True)
    return results


def undisturbed_seconds(name: str, env_steps: int, cache: Path | None) -> float:
    """Returns the time from the making of a run's folder to its end, without a signal."""
    with common.scratch() as folder:
        process, _ = start(name, Path(folder), env_steps, cache)
        began = time.monotonic()
        process.wait()
        return time.monotonic() - began


def attempt(
    name: str, number: signal.Signals, after_seconds: float, env_steps: int, cache: Path | None
) -> dict[str, Any]:
    """Sends a signal so long after the run's folder was made, and returns how the run took it."""
    with common.scratch() as folder:
        process, run_dir = start(name, Path(folder), env_steps, cache)
        time.sleep(after_seconds)
        is_running = process.poll() is None
        sent = time.monotonic()
        if is_running:
            os.killpg(process.pid, number)
        process.wait()
        seconds = time.monotonic() - sent
        summary = json.loads((run_dir / "summary.json").read_text()) if process.returncode == 0 else {}
        resumed = resumed_env_steps(run_dir, 2 * env_steps)
    stopped = summary.get("stopped", "nothing")
    is_expected = process.returncode == 0 and summary.get("num_env_failures") == 0
    return {
        "run": name,
        "signal": number.name if is_running else "too late",
        "after_seconds": round(after_seconds, 1),
        "exit_code": process.returncode,
        "stopped": stopped,
        "env_steps": summary.get("env_steps"),
        "resumed_env_steps": resumed,
        "seconds_to_stop": round(seconds, 2),
        "is_clean": is_expected and seconds <= LIMIT_SECONDS and resumed > summary["env_steps"],
    }


def start(name: str, folder: Path, env_steps: int, cache: Path | None) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts a run in a process group of its own, and returns it with its folder once that is there.

    Args:
      name: a name in `RUNS`.
      folder: folder for the run's own folder.
      env_steps: environment steps of the run.
      cache: folder of compiled programs; None for an empty one.
    """
    env, preset, *flags = RUNS[name]
    run_dir = folder / "run"
    command = [sys.executable, "-m", "qfleet", "train", env, f"--preset={preset}", f"--run-dir={run_dir}", *flags]
    command += [f"--env-steps={env_steps}", "--eval-period-env-steps=1000", "--quiet"]
    variables = os.environ | {"QFLEET_CACHE_DIR": str(cache or folder / "cache")}
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    while not (run_dir / "config.json").exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run must begin, but it ended with exit code {process.returncode}")
        time.sleep(0.01)
    return process, run_dir


def resumed_env_steps(run_dir: Path, env_steps: int) -> int:
    """Returns how far a run comes within its first record after it was resumed."""
    for progress in qfleet.resume(run_dir, env_steps=env_steps):
        return progress.env_steps
    return 0


if __name__ == "__main__":
    main()
