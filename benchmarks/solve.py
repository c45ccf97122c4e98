"""Wall time, from process start, until CartPole-v1 is solved in 20 greedy episodes and 100 fresh ones confirm it.

    python benchmarks/solve.py [--presets pqn double_dqn] [--seeds 10]

Each seed runs twice: cold, with an empty cache of compiled programs, and warm. Afterwards the learned policy plays 100
episodes of Gymnasium's own CartPole. The last row of each preset holds medians, and the number of seeds that solved it.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import common
import gymnasium
import numpy as np

import qfleet

SOLVED = 475


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["pqn", "double_dqn"])
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    results = []
    for preset in arguments.presets:
        rows = [solve(preset, seed) for seed in range(arguments.seeds)]
        results += [*rows, median(rows)]
    common.report("solve", results)


def solve(preset: str, seed: int) -> dict[str, Any]:
    """Trains one seed twice and plays Gymnasium's CartPole with the result."""
    flags = ("--preset", preset, "--seed", str(seed), "--stop-return", str(SOLVED))
    with common.scratch() as folder:
        path = Path(folder)
        cold = common.train(path / "cold", "CartPole-v1", *flags, cache=path / "cache")
        warm = common.train(path / "warm", "CartPole-v1", *flags, cache=path / "cache")
        elsewhere = play_gymnasium(qfleet.load(path / "warm"), num_episodes=100)
    return {
        "preset": preset,
        "seed": str(seed),
        "cold_seconds": common.seconds_since_process_start(cold),
        "warm_seconds": common.seconds_since_process_start(warm),
        "env_steps": warm["env_steps"],
        "solved": int(warm["stopped"] == "return reached"),
        "greedy_return": warm["eval_return_mean"],
        "gymnasium_return": elsewhere,
        "gymnasium_solved": int(elsewhere >= SOLVED),
    }


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of medians, with sums where seeds are counted."""
    counted = ("solved", "gymnasium_solved")
    numbers = {
        name: sum(row[name] for row in rows) if name in counted else statistics.median(row[name] for row in rows)
        for name in rows[0]
        if name not in ("preset", "seed")
    }
    return {"preset": rows[0]["preset"], "seed": "median", **numbers}


def play_gymnasium(policy: qfleet.Policy, num_episodes: int) -> float:
    """Returns the mean return of one episode in each of `num_episodes` lanes of Gymnasium's CartPole."""
    envs = gymnasium.make_vec("CartPole-v1", num_envs=num_episodes, vectorization_mode="vector_entry_point")
    obs, _ = envs.reset(seed=12345)
    returns, has_ended = np.zeros(num_episodes), np.zeros(num_episodes, bool)
    while not has_ended.all():
        obs, reward, terminated, truncated, _ = envs.step(policy(np.asarray(obs, np.float32)))
        returns += np.where(has_ended, 0.0, reward)
        has_ended |= terminated | truncated
    return float(returns.mean())


if __name__ == "__main__":
    main()
