"""CartPole with gossiping peers: whether and when they solve it, and how a run recovers when a peer dies.

    python benchmarks/gossip.py cartpole [--num-processes 4] [--preset rainbow_lite] [--period 100] [--seeds 5]
    python benchmarks/gossip.py faults [--num-processes 4] [--preset rainbow_lite] [--period 100] [--tries 5]
    python benchmarks/gossip.py soak [--num-processes 4] [--preset rainbow_lite] [--period 100] [--seconds 600]

- cartpole: seconds from process start until 20 greedy episodes of the peers' mean have a mean return of 475 and 100
  fresh ones confirm it.
- faults: a peer, or the driver, is killed `--tries` times in one run. `back` is the time until a record of the run
  shows that all peers are ready and that each has taken new environment steps. Then one of them is killed once while
  CartPole is learned, and the run must still reach a mean greedy return of 475.
- soak: the memory of every peer and of the object store, after warm-up.
"""

import argparse
import contextlib
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import common
import fleet
import fleet_limits
from fleet_faults import TIMEOUT_SECONDS, Driver, kill_and_resume, kill_one, seconds

import qfleet

ENDLESS = {"env-steps": 10**9, "eval-period-env-steps": 10**9}
SOLVED = {"env-steps": 1_000_000, "stop-return": 475}

FAULTS = ("kill a peer", "kill the driver")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cartpole", "faults", "soak"))
    parser.add_argument("--num-processes", type=int, default=4)
    parser.add_argument("--preset", default="rainbow_lite")
    parser.add_argument("--period", type=int, default=100, help="learner steps between exchanges")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the soak")
    parser.add_argument("--timeout-seconds", type=float, default=300.0, help="after this a run counts as not solved")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Ray ends first
    if arguments.part == "cartpole":
        common.report("gossip cartpole", [solve(arguments, seed) for seed in range(arguments.seeds)])
    elif arguments.part == "faults":
        common.report("gossip faults", [fault(arguments, name) for name in FAULTS])
    else:
        config = qfleet.make_config(
            "CartPole-v1", arguments.preset, "gossip", num_processes=arguments.num_processes,
            gossip_period_learner_steps=arguments.period, env_steps=10**9,
        )  # fmt: skip
        peers = fleet_limits.topology_of(config)
        common.report("gossip soak", list(fleet_limits.growth(peers, arguments.seconds)))


def flags_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that all runs have."""
    return {
        "preset": arguments.preset,
        "topology": "gossip",
        "num-processes": arguments.num_processes,
        "gossip-period-learner-steps": arguments.period,
        "max-restarts": 100,
    }


def solve(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Returns the row of one seed."""
    flags = flags_of(arguments) | SOLVED | {"seed": seed}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with common.scratch() as folder:
        directory = Path(folder) / "run"
        command = [sys.executable, "-m", "qfleet", "train", "CartPole-v1", "--quiet", *words]
        fleet.run([*command, "--run-dir", str(directory)], arguments.timeout_seconds)
        summary = json.loads((directory / "summary.json").read_text())
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "peers": arguments.num_processes,
        "preset": arguments.preset,
        "period": arguments.period,
        "seed": seed,
        "solved": int(summary["stopped"] == "return reached"),
        "env_steps": summary["env_steps"],
        "wall_seconds": common.seconds_since_process_start(summary),
        "compile_seconds": summary["compile_seconds"],
        "consensus_distance_max": max(record["fleet_consensus_distance"] for record in records),
        "greedy_return": summary["eval_return_mean"],
    }


def fault(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Returns the row of one fault."""
    row = {"fault": name, "tries": arguments.tries, **seconds(back_after(arguments, name))}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(common.scratch()))
        driver = stack.enter_context(train(arguments, folder, SOLVED))
        driver.wait_for(lambda record: record["env_steps"] > 4_000)
        if name == "kill the driver":
            driver = stack.enter_context(kill_and_resume(driver, folder)[0])
        else:
            kill_one("RemotePeer")(driver, random.Random(0))
        code = driver.process.wait(10 * TIMEOUT_SECONDS)
        summary = json.loads((driver.run_dir / "summary.json").read_text())
    return {
        **row,
        "cartpole": summary["stopped"] if code == 0 else f"exit code {code}",
        "cartpole_env_steps": summary["env_steps"],
        "cartpole_restarts": summary["num_restarts"],
    }


def back_after(arguments: argparse.Namespace, name: str) -> list[float]:
    """Causes one fault several times in a run, and returns the seconds until the run was whole again each time."""
    rng, back = random.Random(0), []

    def is_whole(record: dict[str, Any]) -> bool:
        is_ready = record["fleet_peers_ready"] == arguments.num_processes
        return is_ready and record["fleet_peer_env_steps_per_second_min"] > 0

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(common.scratch()))
        driver = stack.enter_context(train(arguments, folder, ENDLESS))
        driver.wait_for(is_whole)
        for _ in range(arguments.tries):
            time.sleep(3 + 3 * rng.random())
            since, happened_at = len(driver.records()), time.time()
            if name == "kill the driver":
                driver, _, happened_at = kill_and_resume(driver, folder)
                stack.enter_context(driver)
                since = len(driver.records())
            else:
                restarts = driver.records()[-1]["fleet_restarts"] + kill_one("RemotePeer")(driver, rng)
                driver.wait_for_restarts(restarts, since)
                since = len(driver.records())
            driver.wait_for(is_whole, since)
            back.append(time.time() - happened_at)
    return back


def train(arguments: argparse.Namespace, folder: Path, flags: dict[str, Any]) -> Driver:
    """Returns the driver of a new run."""
    flags = flags_of(arguments) | {"checkpoint-period-seconds": 2.0} | flags
    return Driver(folder, "train", "CartPole-v1", "--quiet", **flags, run_dir=folder / "run")


if __name__ == "__main__":
    main()
