"""`qfleet plan` against measurement: predicted and measured environment steps/s of settings of all topologies.

    python benchmarks/plan.py [--only NAME ...] [--seconds 6] [--rounds 1]

Each setting is planned, which measures its parts, and run right afterwards. The measured speed is that of the records
after the warm-up: steps over training seconds, without the first two seconds, in which the run is still filling its
pipelines. With several rounds, plans and runs take turns and the table has their medians: a shared host may be half as
fast a minute later.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

SMALL = "--hidden-sizes 64 64 --batch-size 64 --env-steps-per-learner-step 4"

SETTINGS = {
    "fused pqn": "CartPole-v1 --preset pqn",
    "fused pqn, 128 lanes": "CartPole-v1 --preset pqn --num-envs 128",
    "fused dqn": "CartPole-v1 --preset dqn",
    "fused rainbow_lite": "CartPole-v1 --preset rainbow_lite",
    "fused minatar": "gymnax:Breakout-MinAtar --preset dqn --env-steps-per-learner-step 32",
    "fused minatar pqn": "gymnax:Breakout-MinAtar --preset pqn",
    "overlapped dqn": f"gym:CartPole-v1 --preset dqn {SMALL}",
    "overlapped rainbow_lite": f"gym:CartPole-v1 --preset rainbow_lite {SMALL}",
    "overlapped pqn": "gym:CartPole-v1 --preset pqn",
    "overlapped acrobot": f"gym:Acrobot-v1 --preset dqn --num-envs 16 {SMALL}",
    "all-reduce pqn": "CartPole-v1 --preset pqn --topology all-reduce --num-processes 2",
    "all-reduce rainbow_lite": "CartPole-v1 --preset rainbow_lite --topology all-reduce --num-processes 2",
    "gossip pqn": "CartPole-v1 --preset pqn --topology gossip --num-processes 2",
    "gossip rainbow_lite": "CartPole-v1 --preset rainbow_lite --topology gossip --num-processes 2",
    "actor-learner 1": "CartPole-v1 --preset rainbow_lite --topology actor-learner --num-actors 1",
    "actor-learner 2": "CartPole-v1 --preset rainbow_lite --topology actor-learner --num-actors 2",
    "actor-learner 2, gymnasium": f"gym:CartPole-v1 --preset dqn --topology actor-learner --num-actors 2 {SMALL}",
    "actor-learner 2, minatar": "gymnax:Breakout-MinAtar --preset dqn --topology actor-learner --num-actors 2 "
    "--env-steps-per-learner-step 32",
    "parameter-server 1": "CartPole-v1 --preset rainbow_lite --topology parameter-server --num-workers 1",
    "parameter-server 2": "CartPole-v1 --preset rainbow_lite --topology parameter-server --num-workers 2",
    "parameter-server 2, shared": "CartPole-v1 --preset dqn --topology parameter-server --num-workers 2 "
    "--num-replay-shards 1",
    "parameter-server 2, gymnasium": "gym:CartPole-v1 --preset dqn --topology parameter-server "
    f"--num-workers 2 {SMALL}",
}

RUN = "--quiet --no-report --eval-episodes 1 --eval-period-env-steps 1000000000 --checkpoint-period-seconds 1000000"
START_SECONDS = 2.0
"""Training seconds at the start of a run that don't count."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=6.0, help="training seconds of each run")
    parser.add_argument("--rounds", type=int, default=1, help="plans and runs of each setting")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        rounds = [plan_and_run(SETTINGS[name], arguments.seconds) for _ in range(arguments.rounds)]
        predicted, measured = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows.append({"setting": name, "predicted": predicted, "measured": measured, "off": predicted / measured - 1})
        print(rows[-1], flush=True)
    common.report("plan", rows)
    off = [abs(row["off"]) for row in rows]
    print(f"median deviation {statistics.median(off):.0%}, worst {max(off):.0%}")


def plan_and_run(flags: str, seconds: float) -> tuple[float, float]:
    """Returns the predicted and the measured environment steps/s of a setting."""
    speed = plan(flags)
    predicted = float(speed["env_steps_per_second"])
    return predicted, speed_of(run(flags, int(speed["warmup_env_steps"] + predicted * seconds)))


def plan(flags: str) -> dict[str, Any]:
    """Returns the speed that a new plan predicts."""
    command = [sys.executable, "-m", "qfleet", "plan", *shlex.split(flags), "--json", "--measure"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    speed: dict[str, Any] = json.loads(output)["speed"]
    return speed


def run(flags: str, env_steps: int) -> list[dict[str, Any]]:
    """Returns the records of a run that have a speed."""
    env, *rest = shlex.split(flags)
    with common.scratch() as folder:
        directory = Path(folder) / "run"
        common.train(directory, env, *rest, *shlex.split(RUN), "--env-steps", str(env_steps))
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["env_steps_per_second"]]


def speed_of(records: list[dict[str, Any]]) -> float:
    """Returns the environment steps/s of a run's records, without its start and its end."""
    steps = total = passed = 0.0
    before = 0
    for record in records[:-1]:
        new, before = record["env_steps"] - before, record["env_steps"]
        seconds = new / record["env_steps_per_second"]
        passed += seconds
        if passed > START_SECONDS and record["learner_steps_per_second"]:
            steps, total = steps + new, total + seconds
    return steps / total


if __name__ == "__main__":
    main()
