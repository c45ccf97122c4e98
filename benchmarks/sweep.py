"""A sweep in one program: wall time of 32 learning rates against that of one run, and what killing a sweep loses.

python benchmarks/sweep.py [--trials 32] [--env-steps 100000] [--repeats 2] [--kills 10]

Wall times are from process start. The first turn warms the compile cache up and isn't counted.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common

from qfleet.sweeps.trial import ENDS


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--env-steps", type=int, default=100_000, help="environment steps of each trial")
    parser.add_argument("--repeats", type=int, default=2, help="turns that are counted; 0 leaves wall times out")
    parser.add_argument("--kills", type=int, default=0, help="times that a sweep is killed at random moments")
    arguments = parser.parse_args()
    if arguments.repeats:
        common.report("sweep", wall_times(arguments.trials, arguments.env_steps, arguments.repeats))
    if arguments.kills:
        common.report("sweep kills", [killed_again_and_again(arguments.trials, arguments.env_steps, arguments.kills)])


def command(folder: Path, num_trials: int, env_steps: int, at_once: int) -> list[str]:
    """Returns the command of a sweep over learning rates, in batches of at most `at_once`."""
    values = ",".join(f"{10 ** (-4 + 2 * i / max(1, num_trials - 1)):.6g}" for i in range(num_trials))
    return [
        sys.executable, "-m", "qfleet", "sweep", "CartPole-v1", "--env-steps", str(env_steps), "--run-dir", str(folder),
        "--param", f"learning_rate={values}", "--trials", str(num_trials), "--trials-at-once", str(at_once), "--quiet",
    ]  # fmt: skip


def wall_times(num_trials: int, env_steps: int, repeats: int) -> list[dict[str, object]]:
    """Returns the median wall times of one run and of a sweep, which take turns."""
    seconds: dict[str, list[float]] = {"one run": [], "sweep": []}
    with common.scratch() as folder:
        for turn in range(1 + repeats):
            one, sweep = Path(folder) / f"one-{turn}", Path(folder) / f"sweep-{turn}"
            started = time.monotonic()
            common.train(one, "CartPole-v1", "--env-steps", str(env_steps), "--no-report")
            between = time.monotonic()
            subprocess.run(command(sweep, num_trials, env_steps, num_trials), check=True)
            if turn:
                seconds["one run"].append(between - started)
                seconds["sweep"].append(time.monotonic() - between)
    one_run = statistics.median(seconds["one run"])
    return [
        {
            "what": what,
            "trials": num_trials if what == "sweep" else 1,
            "wall_seconds": statistics.median(walls),
            "times_one_run": statistics.median(walls) / one_run,
        }
        for what, walls in seconds.items()
    ]


def killed_again_and_again(num_trials: int, env_steps: int, kills: int) -> dict[str, object]:
    """Kills a sweep at random moments, then lets it end, and counts ended trials that were lost or trained again."""
    rng, num_lost = random.Random(0), 0
    known: dict[str, str] = {}
    with common.scratch() as scratch:
        folder = Path(scratch) / "sweep"
        line = [*command(folder, num_trials, env_steps, max(2, num_trials // 4)), "--checkpoint-period-seconds", "1"]
        num_killed = 0
        for _ in range(kills):
            process = subprocess.Popen(line)
            try:
                process.wait(rng.uniform(2.0, 15.0))
            except subprocess.TimeoutExpired:
                num_killed += 1
            process.kill()
            process.wait()
            now = ended(folder)
            num_lost += sum(now.get(name) != content for name, content in known.items())
            known = now
        num_before = len(known)
        subprocess.run(line, check=True)
        now = ended(folder)
        num_lost += sum(now.get(name) != content for name, content in known.items())
        best = (folder / "best.json").exists()
    return {
        "trials": num_trials,
        "kills": num_killed,
        "ended_before_the_last_start": num_before,
        "ended": len(now),
        "lost": num_lost,
        "has_best": best,
    }


def ended(folder: Path) -> dict[str, str]:
    """Returns the summaries of the trials that have come to their end, by number."""
    found = {path.parent.name: path.read_text() for path in folder.glob("trials/*/summary.json")}
    return {name: text for name, text in found.items() if json.loads(text)["stopped"] in ENDS}


if __name__ == "__main__":
    main()
