"""The family of agents on MinAtar's games: returns after the same number of environment steps.

    python benchmarks/family.py [--games Breakout Asterix SpaceInvaders] [--agents dqn rainbow iqn m_iqn pqn]
                                [--seeds 3] [--env-steps 1000000] [--runs FOLDER] [--results FILE]

All seeds of a row train in one program. Then each plays 100 fresh episodes with one random action in a thousand, as it
was evaluated on the way. A row has the interquartile mean over the seeds' means and its 95 % bootstrap interval, the
mean of each seed, and the training's wall time. `pqn` trains five times as many steps, because it has no replay. The
table takes many hours on a CPU. With `--results FILE`, finished rows are kept there, and with `--runs FOLDER` the runs
themselves, so that the same command goes on where an earlier one was stopped, be it in the middle of a run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import common
import numpy as np

import qfleet
from qfleet.runtime.statistics import bootstrap_interval, interquartile_mean

AGENTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dqn": ("dqn", {}),
    "c51": ("c51", {}),
    "rainbow": ("rainbow", {}),
    "iqn": ("iqn", {}),
    "munchausen": ("munchausen", {}),
    "m_iqn": ("iqn", {"munchausen": True}),
    "pqn": (None, {}),  # as `qfleet train GAME` chooses it
}

REPLAY: dict[str, Any] = {
    "torso": "minatar",
    "hidden_sizes": (128,),
    "num_envs": 8,
    "batch_size": 32,
    "env_steps_per_learner_step": 4.0,
    "replay_capacity": 100_000,
    "warmup_env_steps": 5_000,
    "target_update_period": 1_000,
    "learning_rate": 2.5e-4,
    "optimiser_options": {"eps": 3.125e-4},
}
"""Settings of all agents with a replay, close to those of Obando-Ceron and Castro 2021 (arXiv 2011.14826)."""


def main() -> None:
    """Trains what isn't in the results yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", nargs="+", default=["Breakout", "Asterix", "SpaceInvaders"])
    parser.add_argument("--agents", nargs="+", default=["dqn", "rainbow", "iqn", "m_iqn", "pqn"], choices=AGENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--env-steps", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, help="keeps finished rows, as JSON lines")
    parser.add_argument("--runs", type=Path, help="keeps the runs")
    arguments = parser.parse_args()
    kept = arguments.results.read_text().splitlines() if arguments.results and arguments.results.exists() else []
    rows = {(row["game"], row["agent"]): row for row in map(json.loads, kept)}
    for game in arguments.games:
        for agent in arguments.agents:
            if (game, agent) in rows:
                continue
            rows[game, agent] = row = row_of(game, agent, arguments)
            if arguments.results:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    common.report("family", list(rows.values()))


def row_of(game: str, agent: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the seeds of one row, and plays fresh episodes with each."""
    num_seeds: int = arguments.seeds
    with common.scratch() as folder:
        run_dir = Path(arguments.runs or folder) / f"{game}-{agent}"
        summary = train(game, agent, num_seeds, arguments.env_steps, run_dir)
        policies = [qfleet.load(run_dir, seed=i if num_seeds > 1 else None) for i in range(num_seeds)]
        returns = np.array([policy.evaluate(100, seed=1000) for policy in policies])
    means = returns.mean(axis=1)
    low, high = bootstrap_interval(means[None])
    return {
        "game": game,
        "agent": agent,
        "seeds": num_seeds,
        "env_steps": summary["env_steps"],
        "return_iqm": float(interquartile_mean(means)),
        "low": low.item(),
        "high": high.item(),
        "of_each_seed": " ".join(f"{mean:.1f}" for mean in means),
        "seconds": round(summary["wall_seconds"], 1),
    }


def train(game: str, agent: str, num_seeds: int, env_steps: int, run_dir: Path) -> dict[str, Any]:
    """Trains the seeds of one row, or goes on with their run, and returns the summary."""
    if (run_dir / "config.json").exists():
        return go_on(run_dir)
    preset, settings = AGENTS[agent]
    if preset is None:
        env_steps *= 5
    else:
        explores = {} if agent == "rainbow" else {"exploration_fraction": 0.1, "exploration_end": 0.01}
        settings = {**REPLAY, **explores, **settings}
    return qfleet.train(
        qfleet.make_config(
            f"gymnax:{game}-MinAtar", preset, env_steps=env_steps, num_seeds=num_seeds, run_dir=str(run_dir),
            eval_period_env_steps=env_steps, checkpoint_best=False, report=False, checkpoint_period_seconds=600,
            **settings,
        )
    )  # fmt: skip


def go_on(run_dir: Path) -> dict[str, Any]:
    """Trains what is left of a run, if anything is, and returns its summary."""
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if summary.get("stopped") != "env steps":
        run = qfleet.resume(run_dir)
        for _ in run:
            pass
        summary = dict(run.summary)
        if summary["stopped"] != "env steps":
            raise SystemExit(f"the run in {run_dir} was stopped early; give the same command again to go on")
    return summary


if __name__ == "__main__":
    main()
