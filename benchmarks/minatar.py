"""MinAtar Breakout on a CPU: how much faster convolutions are as patches, and what two minutes of training reach.

    python benchmarks/minatar.py [--seeds 3]

The first table shows the environment steps/s of `pqn` with MinAtar's convolutional network, with native convolutions
and with patches. The second shows the mean return of 100 episodes after `pqn`, with its tuned settings, has trained for
the given wall time or to the end. Breakout begins in two ways only, so a strictly greedy policy plays two episodes,
whatever their number. Therefore one action in a thousand is random, and the table has the number of different episodes
as well as the strictly greedy mean.
"""

import argparse
import statistics
import time
from typing import Any

import common

import qfleet
from qfleet.networks import make_network
from qfleet.runtime.evaluation import EvaluationOptions
from qfleet.topologies.fused.topology import Fused

ENV = "gymnax:Breakout-MinAtar"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="wall time of training, compilation included")
    arguments = parser.parse_args()
    speeds = {lowering: steps_per_second(lowering) for lowering in ("native", "patches")}
    rows = [
        {"convolution": lowering, "env_steps_per_second": speed, "times_native": speed / speeds["native"]}
        for lowering, speed in speeds.items()
    ]
    common.report("minatar_convolution", rows)
    common.report("minatar_return", [train(seed, arguments.seconds) for seed in range(arguments.seeds)])


def steps_per_second(lowering: str) -> float:
    """Returns the median environment steps/s of a few chunks."""
    settings: dict[str, Any] = {"torso": "minatar", "hidden_sizes": (128,), "convolution": lowering}
    config = qfleet.make_config(ENV, "pqn", **settings)
    env = qfleet.make_env(ENV)
    assert isinstance(env, qfleet.InGraphEnv)
    fused = Fused(config, env, make_network(env.spec, config.agent))
    fused.start()
    speeds = []
    for _ in range(6):
        progress = fused.advance(fused.env_steps + 2 * fused.env_steps_per_iteration)
        speeds.append(progress.new_env_steps / progress.train_seconds)
    return statistics.median(speeds[1:])


def train(seed: int, seconds: float) -> dict[str, Any]:
    """Trains one seed for the given time, compilation included, and evaluates it."""
    with common.scratch() as folder:
        started = time.monotonic()
        run = qfleet.iterate(qfleet.make_config(ENV, "pqn", seed=seed, run_dir=f"{folder}/run"))
        for _ in run:
            if time.monotonic() - started >= seconds:
                break
        trained = time.monotonic() - started
        policy = qfleet.load(f"{folder}/run")
        episodes = policy.play_episodes(100, seed=seed + 1000)
        greedy = policy.play_episodes(100, seed=seed + 1000, options=EvaluationOptions())
    return {
        "preset": "pqn",
        "seed": seed,
        "seconds": trained,
        "env_steps": run.summary["env_steps"],
        "return_mean": float(episodes.returns.mean()),
        "return_min": float(episodes.returns.min()),
        "different": int(episodes.num_different()),
        "greedy_mean": float(greedy.returns.mean()),
        "greedy_different": int(greedy.num_different()),
        "peak_rss_gb": run.summary["peak_rss_bytes"] / 1e9,
    }


if __name__ == "__main__":
    main()
