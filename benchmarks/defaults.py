"""What `qfleet train ENV` learns without any settings, in 17 environments, beside Stable-Baselines3's DQN.

    python benchmarks/defaults.py [--envs CartPole-v1 Taxi-v4] [--seeds 5] [--minutes 5] [--processes 2]

Each run is a process of its own. It stops once a mean greedy return of `SOLVED` is confirmed by 100 fresh episodes, at
the end of its default `env_steps`, or after so many minutes. Seconds count from the start of the process. If the peers
are installed (`make bench-peers`), Stable-Baselines3's DQN with its own defaults trains for as many minutes in every
environment that Gymnasium has.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common


class Solved(NamedTuple):
    """The mean return from which an environment counts as solved, and where the figure comes from."""

    mean_return: float
    source: str


_THRESHOLD = "Gymnasium's reward_threshold"
_OURS = "ours: some way from random play, within reach of DQN in a few million steps"

SOLVED = {
    "CartPole-v1": Solved(475, _THRESHOLD),
    "Acrobot-v1": Solved(-100, _THRESHOLD),
    "MountainCar-v0": Solved(-110, _THRESHOLD),
    "LunarLander-v3": Solved(200, _THRESHOLD),
    "FrozenLake-v1": Solved(0.70, _THRESHOLD),
    "FrozenLake8x8-v1": Solved(0.85, _THRESHOLD),
    "CliffWalking-v1": Solved(-13, "the shortest path that avoids the cliff"),
    "Taxi-v4": Solved(8, _THRESHOLD),
    "Blackjack-v1": Solved(-0.1, "the best play pays -0.05; 100 episodes have a standard error of 0.1"),
    "gymnax:Asterix-MinAtar": Solved(10, _OURS),
    "gymnax:Breakout-MinAtar": Solved(10, _OURS),
    "gymnax:Freeway-MinAtar": Solved(45, _OURS),
    "gymnax:SpaceInvaders-MinAtar": Solved(50, _OURS),
    "gymnax:Catch-bsuite": Solved(0.99, "the optimum is 1"),
    "gymnax:DeepSea-bsuite": Solved(0.98, "the optimum is 0.99"),
    "gymnax:FourRooms-misc": Solved(0.95, "the optimum is 1, for reaching the goal"),
    "highway_env:highway-fast-v0": Solved(20, "ours: two thirds of the most that 30 steps pay"),
}


def main() -> None:
    """Prints the table, and one JSON line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(SOLVED), choices=SOLVED, metavar="ENV")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, one or two")
    parser.add_argument("--who", choices=("qfleet", "sb3"), nargs="+", default=("qfleet", "sb3"))
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    arguments = parser.parse_args()
    peers_python = arguments.peers_python if Path(arguments.peers_python).exists() else None
    results = []
    with concurrent.futures.ThreadPoolExecutor(min(2, arguments.processes)) as pool:
        for result in pool.map(lambda run: run(), list(runs(arguments, peers_python))):
            results.append(result)
            print(json.dumps({"benchmark": "defaults", **result}), flush=True)  # all of them together take hours
    common.print_table(results)
    common.print_table(_counts(results))
    for env in arguments.envs:
        print(f"solved, {env}: {SOLVED[env].mean_return:g} ({SOLVED[env].source})")


def runs(arguments: argparse.Namespace, peers_python: str | None) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yields a function for each run, which trains and returns a row of the table."""
    for env, seed in itertools.product(arguments.envs, range(arguments.seeds)):
        if "qfleet" in arguments.who:
            yield functools.partial(train, env, seed, arguments.minutes)
        if "sb3" in arguments.who and peers_python and not env.startswith("gymnax:"):
            yield functools.partial(train_peer, peers_python, env, seed, arguments.minutes)


def train(env: str, seed: int, minutes: float) -> dict[str, Any]:
    """Trains with the default settings in a process of its own, and returns its row of the table."""
    with common.scratch() as folder:
        path = Path(folder) / "run"
        # The equals sign keeps a negative return from being taken for a flag.
        flags = ["--run-dir", str(path), "--quiet", "--seed", str(seed), f"--stop-return={SOLVED[env].mean_return}"]
        process = subprocess.Popen([sys.executable, "-m", "qfleet", "train", env, *flags])
        try:
            process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the run saves what it has
            process.wait()
        summary = json.loads((path / "summary.json").read_text())
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    returns = [line["eval_return_mean"] for line in lines if line.get("eval_return_mean") is not None]
    return {
        "who": "qfleet",
        "env": env,
        "seed": str(seed),
        "preset": summary["preset"],
        "solved": int(summary["stopped"] == "return reached"),
        "return": summary["eval_return_mean"],
        "best_return": max(returns, default=None),
        "env_steps": summary["env_steps"],
        "seconds": summary["wall_seconds"],
    }


def train_peer(python: str, env: str, seed: int, minutes: float) -> dict[str, Any]:
    """Trains Stable-Baselines3's DQN with its defaults, and returns its row of the table."""
    result = common.peer(python, "sb3_defaults.py", env, str(seed), str(minutes), str(SOLVED[env].mean_return))
    return {"who": "sb3", "env": env, "seed": str(seed), "preset": "DQN", **result}


def _counts(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each environment and library: in how many seeds it was solved."""
    rows: dict[tuple[str, str], list[int]] = {}
    for result in results:
        rows.setdefault((result["who"], result["env"]), []).append(result["solved"])
    return [{"who": who, "env": env, "solved": sum(each), "seeds": len(each)} for (who, env), each in rows.items()]


if __name__ == "__main__":
    main()
