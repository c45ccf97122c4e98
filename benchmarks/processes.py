"""Environment steps/s of two processes on two cores, against one process on one core.

Both have the same lanes, learner steps and replay ratio. They learn MinAtar Breakout with the preset `pqn`, with its
tuned settings and with the convolutional network. Run it on a machine with two cores that are otherwise idle.

    python benchmarks/processes.py
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

import qfleet

ENV = "gymnax:Breakout-MinAtar"

CONVOLUTIONS = {"torso": "minatar", "hidden_sizes": (128,)}

SETTINGS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "convolutions": CONVOLUTIONS,
    "convolutions, 2 minibatches": {**CONVOLUTIONS, "num_minibatches": 2},
    "convolutions, 1 minibatch": {**CONVOLUTIONS, "num_minibatches": 1},
}
"""With fewer minibatches there are fewer learner steps on the same samples, and fewer messages between processes."""


def main() -> None:
    """Alternates between both, so that other work on the machine affects both alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="approximate duration of each run")
    parser.add_argument("--only", default="", help="measure only settings whose name contains this")
    parser.add_argument("--measure", nargs=2, metavar=("SETTING", "PROCESSES"), help="measure one run in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure[0], int(arguments.measure[1]), arguments.seconds))
        return
    results = []
    for setting in (name for name in SETTINGS if arguments.only in name):
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(arguments.repeats):
            for num_processes, found in speeds.items():
                command = [sys.executable, __file__, "--measure", setting, str(num_processes)]
                command += ["--seconds", str(arguments.seconds)]
                variables = os.environ | {"PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}
                output = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout
                found.append(float(output.splitlines()[-1]))
        ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
        results.append(
            {
                "setting": setting,
                "one_process": statistics.median(speeds[1]),
                "two_processes": statistics.median(speeds[2]),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    common.report("processes", results)


def measure(setting: str, num_processes: int, seconds: float) -> float:
    """Returns environment steps/s of a run whose processes have one core each."""
    if num_processes == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    topology = {"topology": "all-reduce", "num_processes": 2} if num_processes > 1 else {"topology": "fused"}
    never = 10**9
    with common.scratch() as folder:
        config = qfleet.make_config(
            ENV, "pqn", run_dir=str(Path(folder) / "run"), env_steps=never, eval_period_env_steps=never,
            **topology, **SETTINGS[setting],
        )  # fmt: skip
        steps, spent = 0, 0.0
        for i, progress in enumerate(run := qfleet.iterate(config)):
            if i >= 5:  # the first chunks are shorter: the run is still choosing their length
                steps, spent = steps + progress.new_env_steps, spent + progress.train_seconds
            if spent > seconds:
                break
        del run
        return steps / spent


if __name__ == "__main__":
    main()
