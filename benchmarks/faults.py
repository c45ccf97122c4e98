"""Kills or stops one of several equal processes: whether the run recovers, how soon, and whether it still learns.

python benchmarks/faults.py --signal KILL
python benchmarks/faults.py --signal STOP
"""

import argparse
import logging
import os
import random
import signal
import time
from pathlib import Path

import common

import qfleet

TIMEOUT_SECONDS = 10.0


def main() -> None:
    """Makes each attempt with the next process, at a moment that its seed decides, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    logging.basicConfig()
    results = []
    for i in range(arguments.tries):
        results.append(attempt(signal.Signals[f"SIG{arguments.signal}"], arguments.processes, i))
        print(results[-1], flush=True)
    common.report("faults", results)


def attempt(number: signal.Signals, num_processes: int, seed: int) -> dict[str, object]:
    """Trains on CartPole until it is solved, and loses one process on the way."""
    rng = random.Random(seed)
    victim, after = seed % num_processes, rng.randint(2_000, 15_000)
    lost_at = recovered_at = 0.0
    with common.scratch() as folder:
        run_dir = Path(folder) / "run"
        config = qfleet.make_config(
            "CartPole-v1", "pqn", "all-reduce", num_processes=num_processes, seed=seed, stop_return=475.0,
            run_dir=str(run_dir), silence_seconds=TIMEOUT_SECONDS, checkpoint_period_seconds=2.0,
        )  # fmt: skip
        run = qfleet.iterate(config)
        for progress in run:
            if not lost_at and progress.env_steps > after:
                lost_at = time.monotonic()
                os.kill(process_of(run_dir, victim), number)
            elif lost_at and not recovered_at and time.monotonic() - lost_at > 1:
                recovered_at = time.monotonic()  # the first progress after the processes started again
        summary = run.summary
    return {
        "try": seed,
        "signal": number.name,
        "victim": victim,
        "after_env_steps": after,
        "restarts": summary["num_restarts"],
        "env_steps_repeated": summary["env_steps_repeated"],
        "seconds_to_recover": recovered_at - lost_at,
        "stopped": summary["stopped"],
        "return": summary["eval_return_mean"],
    }


def process_of(run_dir: Path, number: int) -> int:
    """Returns the ID of the process that has this number in a run."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it has ended
            continue
        if str(run_dir) in words and f"--process-id={number}" in words:
            return int(path.parent.name)
    raise RuntimeError(f"no process {number} of {run_dir}")


if __name__ == "__main__":
    main()
