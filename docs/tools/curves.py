"""Measures and draws the learning curves of default settings: docs/pictures/curves.json and curves.svg.

python docs/tools/curves.py [--runs FOLDER] [--redraw]

It runs `qfleet train ENV --num-seeds 5` in four environments, or reads the runs that FOLDER has already. `--redraw`
only draws what was measured before.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from drawing import Drawing

PICTURES = Path(__file__).parents[1] / "pictures"
NUM_SEEDS = 5
ENVS = {  # flags of each, and the return at which it counts as solved, which docs/results.md explains
    "CartPole-v1": (["--env-steps", "150000"], 475),
    "Acrobot-v1": (["--env-steps", "500000"], -100),
    "MountainCar-v0": (["--env-steps", "1500000"], -110),
    "gymnax:Breakout-MinAtar": (["--env-steps", "1100000", "--eval-period-env-steps", "100000"], 10),
}
PANEL = (300, 150)
"""Width and height of a panel, in pixels."""


def measure(folder: Path) -> dict[str, Any]:
    """Returns the curves of all environments, after training those that the folder lacks."""
    curves = {}
    for env, (flags, _) in ENVS.items():
        run = folder / env.split(":")[-1]
        if not (run / "summary.json").is_file():
            command = [sys.executable, "-m", "qfleet", "train", env, "--num-seeds", str(NUM_SEEDS), *flags]
            subprocess.run([*command, "--run-dir", str(run)], check=True)
        curves[env] = read(run)
    return curves


def read(run: Path) -> dict[str, Any]:
    """Returns the environment steps of a run's evaluations, and the mean return of each seed in each of them."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [record for record in records if "eval_return_mean_seed_0" in record]
    return {
        "preset": summary["preset"],
        "env_steps": [record["env_steps"] for record in evaluated],
        "returns": [[round(record[f"eval_return_mean_seed_{i}"], 2) for i in range(NUM_SEEDS)] for record in evaluated],
    }


def draw(curves: dict[str, Any]) -> Drawing:
    """Returns the picture: a panel for each environment, with the median of the seeds and the quartiles."""
    it = Drawing(760, 500, "Mean greedy return against environment steps in four environments, five seeds each")
    for number, (env, curve) in enumerate(curves.items()):
        _panel(it, 66 + 366 * (number % 2), 50 + 226 * (number // 2), env, curve)
    it.legend(66, 484, {"learning": "median of five seeds, and the half of them in the middle"})
    it.line(510, 480, 536, 480)
    it.text(544, 484, "counts as solved", "small")
    return it


def _panel(it: Drawing, left: float, top: float, env: str, curve: dict[str, Any]) -> None:
    width, height = PANEL
    solved, steps, returns = ENVS[env][1], curve["env_steps"], curve["returns"]
    low, high = min(min(map(min, returns)), solved), max(max(map(max, returns)), solved)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + width * x / steps[-1], 1), round(top + height * (high - y) / (high - low), 1)

    it.text(left, top - 14, f"{env.split(':')[-1]}, preset {curve['preset']}", "bold")
    for value in (low, (low + high) / 2, high):
        x, y = place(0, value)
        it.grid_line(x, y, x + width, y)
        it.text(x - 8, y + 4, f"{value:.0f}", "small", anchor="end")
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        it.text(left + width * share, top + height + 18, _short(steps[-1] * share), "small", anchor)
    quartiles = [statistics.quantiles(values, n=4, method="inclusive") for values in returns]
    upper, median, lower = ([place(x, each[i]) for x, each in zip(steps, quartiles, strict=True)] for i in (2, 1, 0))
    it.area(upper + lower[::-1], "learning")
    it.curve(median, "learning")
    it.line(*place(0, solved), *place(steps[-1], solved))


def _short(number: float) -> str:
    if number == 0:
        return "0"
    return f"{number / 1e6:.3g}M steps" if number >= 1e6 else f"{number / 1e3:.3g}k steps"


def main() -> None:
    """Measures if need be, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--redraw", action="store_true")
    arguments = parser.parse_args()
    data = PICTURES / "curves.json"
    if not arguments.redraw:
        data.write_text(json.dumps(measure(arguments.runs)) + "\n", encoding="utf-8")
    curves = json.loads(data.read_text(encoding="utf-8"))
    (PICTURES / "curves.svg").write_text(draw(curves).svg(), encoding="utf-8")
    for env, curve in curves.items():
        last = statistics.median(curve["returns"][-1])
        print(f"{env} with {curve['preset']}: {last:g} after {curve['env_steps'][-1]:,} environment steps")


if __name__ == "__main__":
    main()
