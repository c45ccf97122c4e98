"""Trains on LunarLander-v3 until a mean greedy return of 220 is confirmed, against Stable-Baselines3.

    python benchmarks/lunar_lander.py [--peers-python PATH] [--seeds N]

We use the preset double_dqn with its tuned settings; Stable-Baselines3 uses DQN with rl-zoo's settings. Each then plays
100 fresh episodes. Wall times are those of training.
"""

import argparse
from pathlib import Path
from typing import Any

import common

import qfleet


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = []
    for seed in range(arguments.seeds):
        results.append({"who": "qfleet", "seed": seed, **measure(seed)})
        peer = common.peer(arguments.peers_python, "sb3_lunar_lander.py", str(seed))
        results.append({"who": "sb3", "seed": seed, **peer})
    common.report("lunar_lander", results)


def measure(seed: int) -> dict[str, Any]:
    """Returns seconds from process start to the decision to stop, environment steps, and the mean return then."""
    with common.scratch() as folder:
        run = Path(folder) / "run"
        flags = ("--preset", "double_dqn", "--seed", str(seed), "--stop-return", "220")
        summary = common.train(run, "LunarLander-v3", *flags)
        returns = qfleet.load(run).evaluate(100, seed=1000 + seed)
    return {
        "seconds": common.seconds_since_process_start(summary),
        "env_steps": summary["env_steps"],
        "return_mean": float(returns.mean()),
    }


if __name__ == "__main__":
    main()
