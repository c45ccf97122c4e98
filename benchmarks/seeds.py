"""Many seeds in one program: wall time of 32 CartPole seeds against that of one seed, both from process start.

python benchmarks/seeds.py [--num-seeds 32] [--env-steps 100000]
"""

import argparse
import statistics
from pathlib import Path

import common


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-seeds", type=int, default=32)
    parser.add_argument("--env-steps", type=int, default=100_000, help="environment steps of each seed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the first one warms the cache up")
    arguments = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], arguments.num_seeds: []}
    with common.scratch() as folder:
        for repeat in range(arguments.repeats):
            for num_seeds in seconds:
                flags = ("--num-seeds", str(num_seeds), "--env-steps", str(arguments.env_steps))
                summary = common.train(Path(folder) / f"{num_seeds}-{repeat}", "CartPole-v1", *flags)
                if repeat:
                    seconds[num_seeds].append(common.seconds_since_process_start(summary))
    one = statistics.median(seconds[1])
    results = []
    for num_seeds, walls in seconds.items():
        wall = statistics.median(walls)
        results.append({"num_seeds": num_seeds, "wall_seconds": wall, "times_one_seed": wall / one})
    common.report("seeds", results)


if __name__ == "__main__":
    main()
