"""Shared by the tables: trains each row's seeds, keeps the return of every episode, and prints what they show.

The returns are in `results/TABLE.csv`, which is part of the repository: one line for each trained agent. What is there
isn't trained again, so the same command goes on where it was stopped, and `--again` makes the whole table anew.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
import common

import qfleet
from qfleet.runtime.statistics import bootstrap_interval, interquartile_mean

RESULTS = Path(__file__).parent / "results"
NUM_EPISODES = 100


class Trained(NamedTuple):
    """One trained agent, and the returns of the fresh episodes that it played."""

    env_steps: int
    seconds: float
    """Wall time of its training, divided by the number of seeds if several were trained in one program."""

    returns: Sequence[float]


Measure = Callable[[range], list[Trained]]
"""Trains the given seeds and plays episodes with each."""


class Row(NamedTuple):
    """A row of a table."""

    group: str
    """What the rows that are compared with each other have in common, such as a game."""
    name: str
    measure: Measure
    together: bool = False
    """Train all seeds in one program. Otherwise all rows train their first seed, then their second one, and so on, so
    that a rival is measured in the same hour as we are."""


def ours(env: str, preset: str | None, env_steps: int, **settings: Any) -> Measure:
    """Returns a function that trains qfleet's agents, all seeds in one program.

    Args:
      preset: its name, or None for what `qfleet train ENV` chooses.
      settings: settings that replace those of the preset.
    """

    def measure(seeds: range) -> list[Trained]:
        with common.scratch() as folder:
            run_dir = Path(folder) / "run"
            config = qfleet.make_config(
                env, preset, env_steps=env_steps, seed=seeds.start, num_seeds=len(seeds), run_dir=str(run_dir),
                eval_period_env_steps=env_steps, eval_episodes=1, checkpoint_best=False, report=False, **settings,
            )  # fmt: skip
            begun = time.monotonic()
            summary = qfleet.train(config)
            seconds = (time.monotonic() - begun) / len(seeds)
            policies = [qfleet.load(run_dir, seed=i if len(seeds) > 1 else None) for i in range(len(seeds))]
            return [
                Trained(summary["env_steps"], seconds, policy.evaluate(NUM_EPISODES, seed=1000).tolist())
                for policy in policies
            ]

    return measure


def parser(description: str | None, num_seeds: int) -> argparse.ArgumentParser:
    """Returns a parser of the flags that all tables have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, default=num_seeds)
    made.add_argument("--again", action="store_true", help="forget the returns that are there, of all groups")
    made.add_argument("--only", nargs="+", metavar="GROUP", help="groups of rows to train; all are printed")
    return made


def run(table: str, rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Trains what is missing from a table, and prints it.

    Args:
      table: name of the table and of its file.
      rows: all rows, in the order in which they are printed.
      arguments: the flags of `parser`.
    """
    path, wanted = RESULTS / f"{table}.csv", arguments.only or [row.group for row in rows]
    if unknown := set(wanted) - {row.group for row in rows}:
        raise SystemExit(f"--only must name groups of the table, got {', '.join(sorted(unknown))}")
    if arguments.again and arguments.only:
        raise SystemExit("--again must be given without --only, because it forgets the whole table")
    if arguments.again:
        path.unlink(missing_ok=True)
    for first in range(arguments.seeds):
        for row in rows:
            if row.group in wanted and len(read(path).get((row.group, row.name), [])) <= first:
                seeds = range(first, arguments.seeds if row.together else first + 1)
                _append(path, row, seeds, row.measure(seeds))
    found = read(path)
    common.report(table, [_summary(*key, found[key]) for row in rows if (key := (row.group, row.name)) in found])


def read(path: Path) -> dict[tuple[str, str], list[Trained]]:
    """Returns the trained agents of a table's file by group and name of their row, in the order of their seeds."""
    found: dict[tuple[str, str], list[Trained]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                returns = [float(value) for value in line["returns"].split()]
                agents = found.setdefault((line["group"], line["row"]), [])
                agents.append(Trained(int(line["env_steps"]), float(line["seconds"]), returns))
    return found


def statistics_of(agents: Sequence[Trained]) -> tuple[float, float, float]:
    """Returns the interquartile mean of the agents' mean returns, and the ends of its 95 % bootstrap interval."""
    means = np.array([np.mean(agent.returns) for agent in agents])
    low, high = bootstrap_interval(means[None])
    return float(interquartile_mean(means)), low.item(), high.item()


def _append(path: Path, row: Row, seeds: range, agents: Sequence[Trained]) -> None:
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(("group", "row", "seed", "env_steps", "seconds", "returns"))
        for seed, agent in zip(seeds, agents, strict=True):
            returns = " ".join(f"{value:.6g}" for value in agent.returns)
            writer.writerow((row.group, row.name, seed, agent.env_steps, f"{agent.seconds:.1f}", returns))


def _summary(group: str, name: str, agents: Sequence[Trained]) -> dict[str, Any]:
    middle, low, high = statistics_of(agents)
    return {
        "group": group,
        "row": name,
        "env_steps": agents[0].env_steps,
        "seeds": len(agents),
        "return_iqm": round(middle, 2),
        "low": round(low, 2),
        "high": round(high, 2),
        "of_each_seed": " ".join(f"{np.mean(agent.returns):.2f}" for agent in agents),
        "seconds_per_seed": round(float(np.median([agent.seconds for agent in agents])), 1),
    }
