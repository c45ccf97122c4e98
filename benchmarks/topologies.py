"""The same task in every topology, on the same cores: return against wall time and against environment steps.

python benchmarks/topologies.py [--topologies fused ...] [--seeds 3] [--env-steps 60000] [--plot docs/topologies.svg]
python benchmarks/topologies.py --redraw --plot docs/topologies.svg

The task is CartPole with the preset `rainbow_lite` and 16 lanes in all. It is evaluated every 2,048 environment steps,
and the wall time includes that. `bytes` counts the observations, transitions, gradients and parameters that one process
sends to another per environment step. It is computed from the sizes in docs/topologies.md and from what the run did.

The returns are kept beside the picture, as JSON. `--redraw` draws them again, without training.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

import qfleet
from qfleet.envs.registry import make_env
from qfleet.networks import make_network

SOLVED = 475.0
TRANSITION_BYTES = 2 * 16 + 16
ROW_BYTES = 16 + 13


@dataclasses.dataclass(frozen=True)
class Way:
    """A topology, and what its processes send to each other."""

    flags: tuple[str, ...]
    num_bytes: Callable[[dict[str, float]], float]
    """Computes the bytes sent per environment step from a run's numbers: learner steps `per_env_step`, `batch_size`,
    the bytes of `params`, and `fleet_bytes_per_env_step`, which the run counted itself."""
    env: str = "CartPole-v1"


LIKE_CARTPOLE = (
    "--hidden-sizes", "64", "64", "--layer-norm", "--exploration-env-steps", "10000", "--batch-size", "64",
    "--replay-capacity", "16384", "--env-steps-per-learner-step", "4", "--target-update-period", "100",
)  # fmt: skip
"""Settings that the preset has for CartPole but not for environments that it isn't tuned for, Gymnasium's CartPole
among them."""

WAYS = {
    "fused": Way(("--topology", "fused", "--num-envs", "16"), lambda run: 0.0),
    "overlapped": Way(
        ("--topology", "overlapped", "--num-envs", "16", *LIKE_CARTPOLE), lambda run: 0.0, "gym:CartPole-v1"
    ),
    "all-reduce": Way(
        ("--topology", "all-reduce", "--num-envs", "16", "--num-processes", "2"),
        lambda run: run["per_env_step"] * (2 * run["params"] + run["batch_size"] * TRANSITION_BYTES),
    ),
    "gossip": Way(
        ("--topology", "gossip", "--num-envs", "16", "--num-processes", "4"),
        lambda run: run["fleet_bytes_per_env_step"],
    ),
    "actor-learner": Way(
        ("--topology", "actor-learner", "--num-actors", "4", "--lanes-per-actor", "4"),
        lambda run: (
            ROW_BYTES
            + run["per_env_step"] * run["batch_size"] * (TRANSITION_BYTES + 8)
            + run["fleet_bytes_per_env_step"]
        ),
    ),
    "parameter-server": Way(
        ("--topology", "parameter-server", "--num-workers", "4", "--lanes-per-worker", "4"),
        lambda run: run["fleet_bytes_per_env_step"],
    ),
}


def main() -> None:
    """Prints the table, and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--env-steps", type=int, default=60_000)
    parser.add_argument("--plot", type=Path, help="where to draw the curves, as SVG")
    parser.add_argument("--redraw", action="store_true", help="only draw, from the JSON beside the picture")
    arguments = parser.parse_args()
    if arguments.redraw:
        draw(json.loads(arguments.plot.with_suffix(".json").read_text()), arguments.plot)
        return
    curves: dict[str, list[Points]] = {}
    rows = []
    for name in arguments.topologies:
        runs = [one_run(name, seed, arguments.env_steps) for seed in range(arguments.seeds)]
        curves[name] = [points_of(records) for records, _ in runs]
        rows.append({"topology": name, **figures(WAYS[name], runs)})
        print(rows[-1], flush=True)
    common.report("topologies", rows)
    if arguments.plot:
        arguments.plot.with_suffix(".json").write_text(json.dumps(curves) + "\n")
        draw(curves, arguments.plot)


def one_run(name: str, seed: int, env_steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the records of a run, and its summary."""
    way = WAYS[name]
    flags = ("--preset", "rainbow_lite", "--env-steps", str(env_steps), "--eval-period-env-steps", "2048",
             "--seed", str(seed), "--checkpoint-period-seconds", "100000")  # fmt: skip
    with common.scratch() as folder:
        summary = common.train(Path(folder) / "run", way.env, *flags, *way.flags)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], summary


def figures(way: Way, runs: list[tuple[list[dict[str, Any]], dict[str, Any]]]) -> dict[str, Any]:
    """Returns medians over the seeds. A run that did not reach the return counts with its end."""
    reached = [next((r for r in records if (r["eval_return_mean"] or 0) >= SOLVED), None) for records, _ in runs]
    ends = [found or records[-1] for found, (records, _) in zip(reached, runs, strict=True)]
    config = qfleet.make_config(way.env, "rainbow_lite")
    network = make_network(make_env(way.env).spec, config.agent)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    found = []
    for records, summary in runs:
        moved = sum(
            rate / record["env_steps_per_second"] * record["new_env_steps"]
            for record in with_new_env_steps(records)
            for name, rate in record.items()
            if name.endswith("_bytes_per_second") and record["env_steps_per_second"]
        )
        found.append(
            way.num_bytes(
                {
                    "per_env_step": summary["learner_steps"] / summary["env_steps"],
                    "batch_size": config.agent.batch_size,
                    "params": params,
                    "fleet_bytes_per_env_step": moved / summary["env_steps"],
                }
            )
        )
    staleness = [r["staleness"] for records, _ in runs for r in records if r.get("staleness")]
    return {
        "reached_475": sum(each is not None for each in reached),
        "seeds": len(runs),
        "env_steps_to_475": statistics.median(end["env_steps"] for end in ends),
        "wall_seconds_to_475": statistics.median(end["wall_seconds"] for end in ends),
        "env_steps_per_second": statistics.median(summary["env_steps_per_second"] for _, summary in runs),
        "learner_steps_per_second": statistics.median(summary["learner_steps_per_second"] for _, summary in runs),
        "staleness": statistics.mean(staleness) if staleness else 0.0,
        "bytes_per_env_step": statistics.median(found),
    }


def with_new_env_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records, each with the number of environment steps that it covers."""
    before = [0, *(record["env_steps"] for record in records[:-1])]
    return [{**now, "new_env_steps": now["env_steps"] - then} for now, then in zip(records, before, strict=True)]


Points = list[tuple[float, float]]
"""Mean greedy returns of one run: environment steps, and the return."""


def points_of(run: list[dict[str, Any]]) -> Points:
    """Returns the evaluations among a run's records."""
    points = [(record["env_steps"], record["eval_return_mean"]) for record in run]
    return [(env_steps, mean) for env_steps, mean in points if mean is not None]


def draw(runs: dict[str, list[Points]], path: Path) -> None:
    """Draws a panel for each topology, with a line for each seed, all on the same scale.

    A few seeds have no spread worth a band, and a median between two lines is the return of no run. The grey lines, for
    comparison, are the seeds of the first topology. The table has the seconds.

    Args:
      runs: the runs of each topology, in the order of their seeds.
      path: where to draw, as SVG.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "qfleet", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    num_rows = -(-len(runs) // 3)
    figure, axes = pyplot.subplots(
        num_rows, 3, figsize=(9, 2.2 * num_rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    reference = next(iter(runs))
    for axis, (name, of_seeds) in zip(axes.flat, runs.items(), strict=False):
        for points in runs[reference] if name != reference else []:
            axis.plot(*np.array(points).T, color="0.8", linewidth=0.8)
        for seed, points in enumerate(of_seeds):
            axis.plot(*np.array(points).T, color=f"C{seed}", linewidth=1.2, label=f"seed {seed}")
        axis.axhline(SOLVED, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(name, fontsize=9)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    axes[0, 0].legend(loc="lower right", fontsize=7, frameon=False)
    axes[0, 0].set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("mean greedy return")
    figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


if __name__ == "__main__":
    main()
