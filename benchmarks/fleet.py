"""CartPole with actors on a local Ray cluster, against RLlib's DQN with two environment runners.

    python benchmarks/fleet.py [--part speed|solve] [--side qfleet|rllib] [--num-actors 4] [--lanes-per-actor 8]

- speed: environment steps/s while both learn, with RLlib's defaults and with its example for CartPole. RLlib's counters
  give its replay ratio: how many transitions it trains on per environment step. We use the same replay ratio, network,
  replay and optimiser. We also measure ours with larger batches at the same ratio.
- solve: seconds from process start until 20 greedy episodes have a mean return of 475 and 100 fresh ones confirm it.
  RLlib runs with both settings: compare with the faster. We run `rainbow_lite` as tuned for CartPole, and once more
  with the replay ratio of RLlib's example. Our time includes our evaluations; RLlib's time doesn't include its own.

RLlib's speed depends on how many threads PyTorch takes. It is measured with the number that PyTorch chooses and with
one thread, and solves CartPole with the faster of the two. Each run is alone on the machine, and none of its Ray
processes is left when it ends.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

SETTINGS = ("default", "example")  # of RLlib
REPLAY_RATIO = {"default": 16.0, "example": 3.2}
"""According to RLlib's counters with two environment runners. It is measured again whenever RLlib's speed is."""

LIKE_RLLIB: dict[str, Any] = {
    "preset": "dqn",
    "replay": "prioritised",
    "hidden-sizes": (256, 256),  # RLlib's are followed by tanh, ours by ReLU
    "optimiser": "adam",
    "learning-rate": 5e-4,
    "max-gradient-norm": 40.0,
    "replay-capacity": 50_000,
    "warmup-env-steps": 1_000,
}
N_STEP = {"default": 1, "example": 3}  # the example draws 2 to 5 for each transition
TARGET_UPDATE_ENV_STEPS = 500


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "solve"), help="both by default")
    parser.add_argument("--side", choices=("qfleet", "rllib"), help="both by default")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="settings of RLlib")
    parser.add_argument(
        "--torch-threads", nargs="+", type=int, default=[0, 1], help="for RLlib; with 0, PyTorch chooses"
    )
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--num-actors", type=int, default=4)
    parser.add_argument("--lanes-per-actor", type=int, default=8)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 256], help="our batch sizes; RLlib's is 32")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to measure RLlib's speed for")
    parser.add_argument("--env-steps", type=int, default=200_000, help="steps to measure our speed over")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--timeout-seconds", type=float, default=600.0, help="time after which a run without success is stopped"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Ray ends first
    measured: list[dict[str, Any]] = []
    if arguments.part != "solve":
        measured = compare_speed(arguments)
        common.report("fleet speed", measured)
    if arguments.part != "speed":
        common.report("fleet solve", compare_solve(arguments, measured))


def compare_speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns RLlib's rows, and our rows at the replay ratio of each of its settings."""
    rows = []
    for settings in arguments.settings:
        ratio = REPLAY_RATIO[settings]
        if arguments.side != "qfleet":
            rows += [rllib_speed(arguments, settings, torch_threads) for torch_threads in arguments.torch_threads]
            ratio = rows[-1]["replay_ratio"]
        if arguments.side != "rllib":
            rows += [qfleet_speed(arguments, settings, batch_size, ratio) for batch_size in arguments.batch_sizes]
    return rows


def compare_solve(arguments: argparse.Namespace, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of both sides, one seed after the other.

    Args:
      measured: what `compare_speed` returned, if it ran. It shows with how many threads RLlib is fastest.
    """
    rows = []
    for seed in range(arguments.seeds):
        if arguments.side != "qfleet":
            for settings in arguments.settings:
                found = [row for row in measured if (row["side"], row["settings"]) == ("rllib", settings)]
                fastest = max(found, key=lambda row: row["env_steps_per_second"], default=None)
                threads = fastest["torch_threads"] if fastest else arguments.torch_threads[-1]
                rows.append(rllib_solve(arguments, settings, threads, seed))
        if arguments.side != "rllib":
            rows.append(qfleet_solve(arguments, "tuned", seed))
            rows.append(qfleet_solve(arguments, "example's replay ratio", seed, REPLAY_RATIO["example"]))
    return rows


def rllib_speed(arguments: argparse.Namespace, settings: str, torch_threads: int) -> dict[str, Any]:
    """Returns one of RLlib's rows."""
    words = (
        "speed",
        "--settings",
        settings,
        "--seconds",
        str(arguments.seconds),
        "--torch-threads",
        str(torch_threads),
    )
    # It counts whole iterations of 1,000 environment steps. With too many threads, one iteration can take a minute.
    found = rllib(arguments.peers_python, *words, timeout_seconds=arguments.seconds + 600)
    return {
        "side": "rllib",
        "settings": settings,
        "torch_threads": torch_threads,
        "batch_size": found["batch_size"],
        "replay_ratio": found["replay_ratio"],
        "env_steps_per_second": found["env_steps_per_second"],
        "learner_steps_per_second": found["learner_steps_per_second"],
    }


def qfleet_speed(arguments: argparse.Namespace, settings: str, batch_size: int, replay_ratio: float) -> dict[str, Any]:
    """Returns one of our rows, with the replay ratio that the run really had."""
    env_steps_per_learner_step = batch_size / replay_ratio
    flags = LIKE_RLLIB | {
        "n-step": N_STEP[settings],
        "batch-size": batch_size,
        "env-steps-per-learner-step": env_steps_per_learner_step,
        "target-update-period": max(1, round(TARGET_UPDATE_ENV_STEPS / env_steps_per_learner_step)),
        "env-steps": arguments.env_steps,
        "eval-period-env-steps": arguments.env_steps,
    }
    summary = qfleet_train(arguments, "--double", "--dueling", **flags)
    learner_steps, env_steps = (summary[f"{name}_steps_per_second"] for name in ("learner", "env"))
    return {
        "side": "qfleet",
        "settings": settings,
        "torch_threads": None,
        "batch_size": batch_size,
        "replay_ratio": learner_steps * batch_size / env_steps,
        "env_steps_per_second": env_steps,
        "learner_steps_per_second": learner_steps,
    }


def rllib_solve(arguments: argparse.Namespace, settings: str, torch_threads: int, seed: int) -> dict[str, Any]:
    """Returns one of RLlib's rows."""
    seconds = arguments.timeout_seconds
    words = ["solve", "--settings", settings, "--torch-threads", str(torch_threads)]
    words += ["--seed", str(seed), "--timeout-seconds", str(seconds)]
    found = rllib(arguments.peers_python, *words, timeout_seconds=2 * seconds + 600)  # it stops by itself long before
    return {
        "side": "rllib",
        "settings": settings,
        "torch_threads": torch_threads,
        "seed": seed,
        "solved": found["solved"],
        "wall_seconds": found["wall_seconds"],
        "env_steps": found["env_steps"],
        "greedy_return": found["greedy_return"],
    }


def qfleet_solve(
    arguments: argparse.Namespace, name: str, seed: int, replay_ratio: float | None = None
) -> dict[str, Any]:
    """Returns one of our rows, with the tuned replay ratio or another one."""
    flags: dict[str, Any] = {"preset": "rainbow_lite", "seed": seed, "stop-return": 475, "env-steps": 1_000_000}
    if replay_ratio is not None:
        flags |= {"batch-size": 64, "env-steps-per-learner-step": 64 / replay_ratio}
    summary = qfleet_train(arguments, **flags)
    return {
        "side": "qfleet",
        "settings": name,
        "torch_threads": None,
        "seed": seed,
        "solved": int(summary["stopped"] == "return reached"),
        "wall_seconds": common.seconds_since_process_start(summary),
        "env_steps": summary["env_steps"],
        "greedy_return": summary["eval_return_mean"],
    }


def rllib(python: str, *words: str, timeout_seconds: float) -> dict[str, Any]:
    """Runs RLlib's script and returns the JSON of its last line."""
    output = run([python, str(common.HERE / "peers" / "rllib_cartpole.py"), *words], timeout_seconds)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def qfleet_train(arguments: argparse.Namespace, *words: str, **flags: Any) -> dict[str, Any]:
    """Runs `qfleet train` with the actor-learner topology, and returns its summary.

    Args:
      words: further flags, without values.
      flags: names and values; a tuple stands for several values.
    """
    flags |= {
        "topology": "actor-learner",
        "num-actors": arguments.num_actors,
        "lanes-per-actor": arguments.lanes_per_actor,
    }
    command = [sys.executable, "-m", "qfleet", "train", "CartPole-v1", "--quiet", *words]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    with common.scratch() as folder:
        directory = Path(folder) / "run"
        run([*command, "--run-dir", str(directory)], arguments.timeout_seconds)
        summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
        return summary


def run(command: list[str], timeout_seconds: float) -> str:
    """Runs a program in a session of its own, ends what is left of the session, and returns what the program printed.

    Args:
      command: command line of the program.
      timeout_seconds: time after which the program is interrupted.

    Raises:
      subprocess.CalledProcessError: if the program fails, or doesn't end in order when it is interrupted.
      subprocess.TimeoutExpired: if the program doesn't end at all.
    """
    with common.scratch() as folder, contextlib.ExitStack() as stack:
        # Ray's own clean-up ends a whole process group, which must not be the group of this process.
        process = subprocess.Popen(
            command, env=os.environ | {"RAY_TMPDIR": folder}, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        stack.callback(end_session, process)
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # qfleet then writes its summary and ends in order
            output, _ = process.communicate(timeout=60)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, output)
        return output


def end_session(process: subprocess.Popen[str]) -> None:
    """Kills all processes of the session that this process leads, and waits until none is left."""
    while members := session_members(process.pid):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.1)


def session_members(session: int) -> list[int]:
    """Returns the processes of a session that have not ended."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # pid (name) state ppid pgrp session ...; the name may contain anything.
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "XZ":
                members.append(int(path.parent.name))
    return members


if __name__ == "__main__":
    main()
