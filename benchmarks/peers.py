"""Environment steps/s on CartPole against peers whose whole program is compiled too, with their network and schedule.

    python benchmarks/peers.py [--peers-python PATH] [--purejaxrl CHECKOUT]

- rejax's PQN with its CartPole settings: 16 lanes, rollouts of 128, 5 epochs of 16 minibatches, two layers of 64.
- purejaxrl's DQN: 10 lanes, one update of 128 transitions per 10 steps, layers of 120 and 84. purejaxrl isn't packaged.
  Without a checkout of it, only our side of this pair is measured.

Each side runs alone, in a process of its own. The sides alternate, and medians are shown.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

REJAX = {
    "preset": "pqn",
    "num-envs": 16,
    "rollout-length": 128,
    "num-epochs": 5,
    "num-minibatches": 16,
    "optimiser": "adam",
    "learning-rate": 3e-4,
    "trace-decay": 0.9,
    "exploration-end": 0.05,
    "exploration-env-steps": 262_144,
    "env-steps": 2_097_152,
}
PUREJAXRL = {
    "preset": "dqn",
    "num-envs": 10,
    "batch-size": 128,
    "env-steps-per-learner-step": 10.0,
    "replay-capacity": 10_000,
    "warmup-env-steps": 10_000,
    "loss": "squared",
    "max-gradient-norm": None,
    "learning-rate": 2.5e-4,
    "target-update-period": 50,
    "exploration-env-steps": 250_000,
    "env-steps": 500_000,
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--purejaxrl", help="a checkout of purejaxrl")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    def rejax() -> float:
        return float(common.peer(arguments.peers_python, "rejax_pqn.py")["env_steps_per_second"])

    def purejaxrl() -> float:
        return float(
            common.peer(arguments.peers_python, "purejaxrl_dqn.py", arguments.purejaxrl)["env_steps_per_second"]
        )

    results = [compare("rejax pqn", rejax, REJAX, ("64", "64"), arguments.repeats)]
    peer = purejaxrl if arguments.purejaxrl else None
    results.append(compare("purejaxrl dqn", peer, PUREJAXRL, ("120", "84"), arguments.repeats))
    common.report("peers", results)


def compare(
    name: str,
    peer: Callable[[], float] | None,
    settings: dict[str, Any],
    hidden_sizes: tuple[str, ...],
    repeats: int,
) -> dict[str, Any]:
    """Returns the medians of both sides, and the median ratio of the pairs."""
    flags = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    flags += ["--hidden-sizes", *hidden_sizes, "--eval-period-env-steps", str(settings["env-steps"])]
    ours, theirs = [], []
    for _ in range(repeats):
        with common.scratch() as folder:
            ours.append(float(common.train(Path(folder) / "run", "CartPole-v1", *flags)["env_steps_per_second"]))
        if peer is not None:
            theirs.append(peer())
    return {
        "peer": name,
        "peer_env_steps_per_second": statistics.median(theirs) if theirs else None,
        "qfleet_env_steps_per_second": statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None,
    }


if __name__ == "__main__":
    main()
