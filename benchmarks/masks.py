"""Action masks: invalid actions in each topology, and environment steps to solve a maze with and without masks.

    python benchmarks/masks.py [--topologies fused ...] [--env-steps 1000000] [--ray-env-steps 1000000] [--seeds 5]

The maze is that of examples/masked_grid.py. With masks, an invalid action is an error: in Gymnasium it raises, and the
run counts the failure and goes on; in JAX its reward is NaN, which ends the run. The maze is solved once 200 greedy
episodes take at most 1.05 times as many steps as the shortest ways.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

import qfleet

EXAMPLES = common.HERE.parent / "examples"
sys.path.append(str(EXAMPLES))
masked_grid = importlib.import_module("masked_grid")

JAX, GYMNASIUM = "masked_grid:MaskedGrid-jax", "masked_grid:MaskedGrid-v0"

COMMON = (
    "--hidden-sizes", "--discount", "0.98", "--learning-rate", "0.01", "--batch-size", "64",
    "--warmup-env-steps", "1000", "--replay-capacity", "20000",
    "--env-steps-per-learner-step", "64", "--eval-exploration", "0.2", "--eval-episodes", "10",
    "--eval-period-env-steps", "100000", "--no-report",
)  # fmt: skip

EXPLORES = ("--exploration-end", "0.1", "--exploration-env-steps", "20000")
FAILURES = ("--max-failures", "1000")

WAYS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fused": (JAX, "double_dqn", ("--topology", "fused", "--num-envs", "64")),
    "fused, pqn": (JAX, "pqn", ("--topology", "fused", "--num-envs", "64")),
    "overlapped": (GYMNASIUM, "double_dqn", ("--topology", "overlapped", "--num-envs", "64", *FAILURES)),
    "all-reduce": (JAX, "double_dqn", ("--topology", "all-reduce", "--num-envs", "64", "--num-processes", "2")),
    "actor-learner": (
        GYMNASIUM,
        "rainbow_lite",
        ("--topology", "actor-learner", "--num-actors", "2", "--lanes-per-actor", "32", *FAILURES),
    ),
    "parameter-server": (
        GYMNASIUM,
        "double_dqn",
        ("--topology", "parameter-server", "--num-workers", "2", "--lanes-per-worker", "32", *FAILURES),
    ),
    "gossip": (JAX, "double_dqn", ("--topology", "gossip", "--num-processes", "2", "--num-envs", "64")),
}
"""For each topology the environment, the preset and flags."""

ON_RAY = ("actor-learner", "parameter-server", "gossip")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--env-steps", type=int, default=1_000_000)
    parser.add_argument("--ray-env-steps", type=int, default=1_000_000, help="the same for topologies on Ray")
    parser.add_argument("--seeds", type=int, default=5, help="seeds that solve the maze; 0 leaves that out")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    rows = []
    with common.scratch() as folder:
        for name in arguments.topologies:
            env_steps = arguments.ray_env_steps if name in ON_RAY else arguments.env_steps
            rows.append(count_invalid(name, env_steps, Path(folder) / name.replace(", ", "-")))
            print(json.dumps(rows[-1]), flush=True)
    if rows:
        common.report("masks", rows)
    if arguments.seeds:
        common.report("masks_learning", [solve(has_masks, arguments.seeds) for has_masks in (True, False)])


def count_invalid(name: str, env_steps: int, directory: Path) -> dict[str, Any]:
    """Trains in one topology, and returns what it did."""
    env, preset, flags = WAYS[name]
    flags = (*flags, *(COMMON[-7:] if preset == "pqn" else COMMON))
    if name != "actor-learner":  # whose actors have an epsilon each
        flags += EXPLORES
    summary = common.train(directory, env, "--preset", preset, *flags, "--env-steps", str(env_steps))
    return {
        "topology": name,
        "environment": env.partition(":")[2],
        "env_steps": summary["env_steps"],
        "invalid_actions": summary["num_env_failures"],
        "wall_seconds": summary["wall_seconds"],
    }


def shortest() -> float:
    """Returns the mean length of the shortest way to the goal, over all cells but the goal."""
    distance, front = {masked_grid.GOAL: 0}, [masked_grid.GOAL]
    while front:
        cell = front.pop(0)
        for way in np.flatnonzero(masked_grid.MAZE[cell]):
            following = int(cell + masked_grid.MOVES[way])
            if following not in distance:
                distance[following] = distance[cell] + 1
                front.append(following)
    return statistics.fmean(steps for steps in distance.values() if steps)


def solve(has_masks: bool, num_seeds: int) -> dict[str, Any]:
    """Trains some seeds, and returns the environment steps after which each solved the maze."""
    found = []
    for seed in range(num_seeds):
        with common.scratch() as folder:
            config = qfleet.make_config(
                "masked_grid:MaskedGrid-jax",
                "double_dqn",
                env_options={"has_masks": has_masks},
                hidden_sizes=(),
                discount=0.98,
                learning_rate=0.01,
                batch_size=64,
                num_envs=16,
                n_step=3,
                warmup_env_steps=1_000,
                exploration_end=0.1,
                exploration_env_steps=20_000,
                target_update_period=100,
                env_steps=200_000,
                eval_period_env_steps=1_000,
                eval_episodes=200,
                stop_return=-1.05 * shortest(),
                seed=seed,
                checkpoint_best=False,
                report=False,
                run_dir=f"{folder}/run",
            )
            steps = 0
            for progress in qfleet.iterate(config):
                steps = progress.env_steps
            found.append(steps)
    return {
        "masks": has_masks,
        "shortest_way": shortest(),
        "median_env_steps": statistics.median(found),
        "most_env_steps": max(found),
        "env_steps_of_seeds": found,
    }


if __name__ == "__main__":
    main()
