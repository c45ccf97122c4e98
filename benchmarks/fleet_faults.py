"""Faults in a fleet: how soon a lost process is replaced, what is lost with it, and whether the run still learns.

    python benchmarks/fleet_faults.py [--topology actor-learner|parameter-server] [--faults "kill an actor" ...]
                                      [--tries 5] [--part witness|cartpole]

- witness: an environment whose observations tell where they come from. The fault happens `--tries` times in one run.
  Afterwards the replay of the last checkpoint must hold each step of the environments once, in order and in its place.
  `back` is the time until a record of the run shows all processes ready, new rows of every actor, and new learner
  steps.
- cartpole: the fault happens once while the run learns CartPole, and it must still reach a mean greedy return of 475.

The nodes that leave and join belong to Ray's own test cluster, on this machine.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import common
import fleet

from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_directory import RunDirectory
from qfleet.topologies.restoring import saved_replay

sys.path.insert(0, str(common.HERE.parent / "tests"))
import witness

NUM_ACTORS = 4
"""Number of actors, or of workers of a parameter server, which also act."""

TIMEOUT_SECONDS = 90.0
"""Longest time that a fleet may take to start, or to be whole again."""

SILENCE_SECONDS = 5.0

PAUSE_SECONDS = 60.0
"""Shorter than the time after which a silent process is replaced by default."""

WITNESS = {
    "preset": "rainbow_lite",
    "hidden-sizes": (32, 32),
    "replay-capacity": 2_000_000,  # nothing is overwritten
    "warmup-env-steps": 1_000,
    "env-steps-per-learner-step": 16,
    "env-steps": 100_000_000,
    "eval-period-env-steps": 100_000_000,
}
CARTPOLE = {"preset": "rainbow_lite", "stop-return": 475, "env-steps": 300_000}


class Driver:
    """A `qfleet` process, its log, and the processes of its fleet."""

    def __init__(self, folder: Path, *words: str, **flags: Any) -> None:
        """Starts the process in a session of its own."""
        command = [sys.executable, "-m", "qfleet", *words]
        for name, value in flags.items():
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
        self.run_dir, self._log = folder / "run", folder / "log"
        path = os.pathsep.join(filter(None, (str(common.HERE.parent / "tests"), os.environ.get("PYTHONPATH"))))
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": path},
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        fleet.end_session(self.process)

    @property
    def log(self) -> str:
        """Everything that the process has printed until now."""
        return self._log.read_text()

    def remote_processes(self, kind: str) -> list[int]:
        """Returns the IDs of the processes whose class name begins with `kind`, oldest first."""
        return [pid for pid in self.processes() if _title(pid).startswith(f"ray::{kind}")]

    def processes(self) -> list[int]:
        """Returns the IDs of this process and of all that it has started."""
        return sorted(fleet.session_members(self.process.pid))

    def records(self) -> list[dict[str, Any]]:
        """Returns the records of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for(self, is_it: Callable[[dict[str, Any]], bool], since: int = 0) -> dict[str, Any]:
        """Returns the first record, from number `since` on, for which `is_it` is true.

        Raises:
          RuntimeError: if there is no such record in time, or the process ends.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            for record in self.records()[since:]:
                if is_it(record):
                    return record
            self.check()
            time.sleep(0.02)
        raise RuntimeError(f"waited in vain for a record of {self.run_dir}\n{self.log}")

    def wait_for_restarts(self, restarts: int, since: int) -> None:
        """Waits until `restarts` processes have been lost and their replacements started."""
        self.wait_for(lambda record: record["fleet_restarts"] >= restarts, since)

    def wait_for_replaced(self, restarts: int, since: int) -> None:
        """Waits until `restarts` processes have been replaced and all processes are at work."""
        self.wait_for_restarts(restarts, since)
        self.wait_for(is_whole, len(self.records()))  # a later record, because the newest may be from before the loss

    def check(self) -> None:
        """Raises RuntimeError if the process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the driver has ended with exit code {self.process.returncode}\n{self.log}")

    def stop(self) -> tuple[int, float]:
        """Asks the process to end, and returns its exit code and how long it took, in seconds."""
        asked_at = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_SECONDS), time.monotonic() - asked_at

    def orphan_seconds(self) -> float:
        """Returns how long it took until no remote process was left, in seconds.

        Two idle agents of Ray may stay for a minute; they don't count.
        """
        ended_at = time.monotonic()
        while self.remote_processes("Remote") and time.monotonic() < ended_at + TIMEOUT_SECONDS:
            time.sleep(0.05)
        return time.monotonic() - ended_at


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that happens to a fleet."""

    happen: Callable[[Driver, random.Random], int]
    """Makes the fault happen, and returns how many processes must be replaced."""
    checkpoint_period_seconds: float = 2.0
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)


def kill_one(kind: str, number: signal.Signals = signal.SIGKILL) -> Callable[[Driver, random.Random], int]:
    """Returns a fault that sends a signal to one process of that kind."""

    def happen(driver: Driver, rng: random.Random) -> int:
        os.kill(rng.choice(driver.remote_processes(kind)), number)
        return 1

    return happen


def kill_all(kind: str) -> Callable[[Driver, random.Random], int]:
    """Returns a fault that kills all processes of that kind at once."""

    def happen(driver: Driver, _: random.Random) -> int:
        processes = driver.remote_processes(kind)
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        return len(processes)

    return happen


def pause_one(kind: str) -> Callable[[Driver, random.Random], int]:
    """Returns a fault that stops one process of that kind for `PAUSE_SECONDS`, after which it goes on."""

    def happen(driver: Driver, rng: random.Random) -> int:
        pid = rng.choice(driver.remote_processes(kind))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        os.kill(pid, signal.SIGCONT)
        return 0

    return happen


NEVER = 1e6
IMPATIENT = {"silence-seconds": SILENCE_SECONDS}
OF_FLEETS = {
    "kill an actor": Fault(kill_one("RemoteActor")),
    "kill all actors": Fault(kill_all("RemoteActor")),
    "kill a shard": Fault(kill_one("RemoteReplayShard"), flags={"num-replay-shards": 2}),
    "kill a shard, no checkpoint": Fault(kill_one("RemoteReplayShard"), NEVER, {"num-replay-shards": 2}),
    "kill the only shard": Fault(kill_one("RemoteReplayShard")),
    "kill the learner": Fault(kill_one("RemoteLearner")),
    "kill the learner, no checkpoint": Fault(kill_one("RemoteLearner"), NEVER),
    "stop an actor": Fault(kill_one("RemoteActor", signal.SIGSTOP), flags=IMPATIENT),
    "stop a shard": Fault(kill_one("RemoteReplayShard", signal.SIGSTOP), flags=IMPATIENT),
    "stop the learner": Fault(kill_one("RemoteLearner", signal.SIGSTOP), flags=IMPATIENT),
    "pause an actor": Fault(pause_one("RemoteActor")),
    "pause a shard": Fault(pause_one("RemoteReplayShard"), flags={"num-replay-shards": 2}),
    "pause the learner": Fault(pause_one("RemoteLearner")),
}
OF_SERVERS = {
    "kill a worker": Fault(kill_one("RemoteWorker")),
    "kill a worker, no checkpoint": Fault(kill_one("RemoteWorker"), NEVER),
    "kill all workers": Fault(kill_all("RemoteWorker")),
    "kill a server shard": Fault(kill_one("RemoteServerShard"), flags={"num-server-shards": 2}),
    "kill the only server shard": Fault(kill_one("RemoteServerShard")),
    "kill the server, no checkpoint": Fault(kill_all("RemoteServerShard"), NEVER, {"num-server-shards": 2}),
    "kill a shard of a shared replay": Fault(kill_one("RemoteReplayShard"), flags={"num-replay-shards": 2}),
    "stop a worker": Fault(kill_one("RemoteWorker", signal.SIGSTOP), flags=IMPATIENT),
    "stop a server shard": Fault(
        kill_one("RemoteServerShard", signal.SIGSTOP), flags={"num-server-shards": 2, **IMPATIENT}
    ),
    "pause a worker": Fault(pause_one("RemoteWorker")),
    "pause a server shard": Fault(pause_one("RemoteServerShard"), flags={"num-server-shards": 2}),
}
FAULTS = OF_FLEETS | OF_SERVERS


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=("actor-learner", "parameter-server"), default="actor-learner")
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS, *TRIALS])
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--part", choices=("witness", "cartpole"), help="both by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Ray ends first
    results = []
    is_fleet = arguments.topology == "actor-learner"
    trials = TRIALS if is_fleet else ("kill the driver", "a slow one")
    for name in arguments.faults or [*(OF_FLEETS if is_fleet else OF_SERVERS), *trials]:
        row: dict[str, Any] = {"fault": name, **dict.fromkeys(COLUMNS)}
        if arguments.part != "cartpole":
            row |= TRIALS.get(name, of_processes)(name, arguments)
        if arguments.part != "witness" and name in (*FAULTS, "kill the driver"):
            row |= cartpole(name, arguments)
        results.append(row)
        print(row, flush=True)
    common.report("fleet faults", results)


COLUMNS = (
    "tries", "back_seconds", "back_seconds_max", "restarts", "transitions_lost", "transitions_back", "exit_code",
    "stop_seconds", "orphan_seconds", "rows", "writers", "cuts", "oracle", "cartpole", "cartpole_env_steps",
    "cartpole_restarts",
)  # fmt: skip


def of_processes(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes one fault happen several times in a run of the witness, and returns its row."""
    fault, rng = FAULTS[name], random.Random(arguments.seed)
    back = []
    flags = {"checkpoint-period-seconds": fault.checkpoint_period_seconds, **fault.flags}
    with driver_of_witness(arguments, **flags) as driver:
        driver.wait_for(is_whole)
        for _ in range(arguments.tries):
            time.sleep(3 * rng.random() + min(3.0, fault.checkpoint_period_seconds))
            since, restarts = len(driver.records()), driver.records()[-1]["fleet_restarts"]
            happened_at = time.monotonic()
            expected = restarts + fault.happen(driver, rng)
            driver.wait_for_replaced(expected, since)
            back.append(time.monotonic() - happened_at)
        return {"tries": arguments.tries, **seconds(back), **end(driver)}


def of_driver(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills the driver several times, resumes the run each time, and returns its row."""
    rng = random.Random(arguments.seed)
    back, orphans = [], []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(common.scratch()))
        flags = WITNESS | {"checkpoint-period-seconds": 2.0}
        driver = stack.enter_context(train(arguments, folder, "witness:Witness-v0", flags))
        driver.wait_for(is_whole)
        for _ in range(arguments.tries):
            time.sleep(3 + 3 * rng.random())
            driver, orphan_seconds, resumed_at = kill_and_resume(driver, folder)
            stack.enter_context(driver)
            orphans.append(orphan_seconds)
            driver.wait_for(is_whole, len(driver.records()))
            back.append(time.time() - resumed_at)
        return {"tries": arguments.tries, **seconds(back), **end(driver), "orphan_seconds": max(orphans)}


def kill_and_resume(driver: Driver, folder: Path) -> tuple[Driver, float, float]:
    """Kills a driver, waits until all processes that it had started are gone, and resumes its run in another driver.

    Returns:
      The new driver, once it has dropped the records after its checkpoint; how long the remote processes outlived the
      old driver, in seconds; and the time when the new driver was started.
    """
    driver.process.kill()
    driver.process.wait()
    orphan_seconds, resumed_at = driver.orphan_seconds(), time.time()
    driver = Driver(folder, "resume", str(folder / "run"), "--trust", "--quiet")
    while (folder / "run" / "metrics.jsonl").stat().st_mtime < resumed_at:
        driver.check()
    return driver, orphan_seconds, resumed_at


def of_slow_actor(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the speed of the other actors while one takes 50 ms longer for each step, and returns its row."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(common.scratch())
        options = {"env-options": ("slow_seconds", 0.05, "once", folder + "/slow")}
        driver = stack.enter_context(driver_of_witness(arguments, **options))
        driver.wait_for(lambda record: record["fleet_replay_transitions"] > 20_000)
        time.sleep(10)
        newest = driver.records()[-10:]
        slowest, middle = (
            statistics.mean(rate for record in newest for rate in env_steps_per_second(record, which))
            for which in ("min", "median")
        )
        print(f"{name}: {slowest:.0f} environment steps/s, the others {middle:.0f}", flush=True)
        return {"tries": 1, **end(driver)}


def of_nodes(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Removes a node with the learner, or with actors and a shard, and adds another one; returns its row."""
    import ray.cluster_utils

    # Parameters large enough for Ray to keep them where they were made.
    resources = {"learner-resources": ("CPU", 1, "place", 1), "hidden-sizes": (256, 256)} if "learner" in name else {}
    node_has: dict[str, Any] = {"num_cpus": 1 if resources else 3, "resources": {"place": 1}}
    back = []
    with contextlib.ExitStack() as stack:
        head = {"num_cpus": 6 if resources else 4, "include_dashboard": False}
        cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        stack.callback(cluster.shutdown)
        node = cluster.add_node(**node_has)
        flags = {"ray-address": cluster.address, "num-replay-shards": 2, "checkpoint-period-seconds": 2.0}
        driver = stack.enter_context(driver_of_witness(arguments, **flags, **resources))
        driver.wait_for(is_whole)
        for _ in range(arguments.tries):
            time.sleep(4)
            restarts = driver.records()[-1]["fleet_restarts"]
            cluster.remove_node(node, allow_graceful=False)
            driver.wait_for_restarts(restarts + 1, len(driver.records()))
            time.sleep(4)
            since, joined_at = len(driver.records()), time.monotonic()
            node = cluster.add_node(**node_has)
            driver.wait_for(is_whole, since)
            back.append(time.monotonic() - joined_at)
        return {"tries": arguments.tries, **seconds(back), **end(driver)}


TRIALS = {
    "kill the driver": of_driver,
    "a slow one": of_slow_actor,
    "a node leaves, another joins": of_nodes,
    "the learner's node leaves, another joins": of_nodes,
}


def cartpole(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes one fault happen while CartPole is learned, and returns whether the run still solves it."""
    fault, seed = FAULTS.get(name), arguments.seed
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(common.scratch()))
        flags = CARTPOLE | {"checkpoint-period-seconds": 2.0, "seed": seed}
        if fault:
            flags |= {"checkpoint-period-seconds": fault.checkpoint_period_seconds} | fault.flags
        driver = stack.enter_context(train(arguments, folder, "CartPole-v1", flags))
        driver.wait_for(lambda record: record["env_steps"] > 4_000)
        if fault:
            fault.happen(driver, random.Random(seed))
        else:
            driver.process.kill()
            driver.process.wait()
            driver = stack.enter_context(Driver(folder, "resume", str(folder / "run"), "--trust", "--quiet"))
        code = driver.process.wait(10 * TIMEOUT_SECONDS)
        summary = json.loads((driver.run_dir / "summary.json").read_text())
    return {
        "cartpole": summary["stopped"] if code == 0 else f"exit code {code}",
        "cartpole_env_steps": summary["env_steps"],
        "cartpole_restarts": summary["num_restarts"],
    }


def train(arguments: argparse.Namespace, folder: Path, env: str, flags: dict[str, Any]) -> Driver:
    """Returns the driver of a new run."""
    who = "actor" if arguments.topology == "actor-learner" else "worker"
    sizes = {f"num-{who}s": NUM_ACTORS, "max-restarts": 100}
    if env != "CartPole-v1":
        sizes |= {f"lanes-per-{who}": 2}
    return Driver(
        folder, "train", env, "--quiet", topology=arguments.topology, **sizes, **flags, run_dir=folder / "run"
    )


@contextlib.contextmanager
def driver_of_witness(arguments: argparse.Namespace, **flags: Any) -> Iterator[Driver]:
    """Runs the witness in a folder of its own, until the block ends."""
    with common.scratch() as folder, train(arguments, Path(folder), "witness:Witness-v0", WITNESS | flags) as driver:
        yield driver


def is_whole(record: dict[str, Any]) -> bool:
    """Returns whether all processes were ready and at work."""
    return (
        NUM_ACTORS in (record.get("fleet_actors_ready"), record.get("fleet_workers_ready"))
        and min(env_steps_per_second(record, "min")) > 0
        and record["learner_steps_per_second"] > 0
    )


def env_steps_per_second(record: dict[str, Any], which: str) -> list[float]:
    """Returns the `min` or `median` over the actors or workers; 0 if the record covers no training."""
    return [value for name, value in record.items() if name.endswith(f"_env_steps_per_second_{which}")] or [0.0]


def seconds(back: list[float]) -> dict[str, float]:
    """Returns the fields of a row that say how long it took until the fleet was whole again."""
    return {"back_seconds": statistics.median(back), "back_seconds_max": max(back)}


def end(driver: Driver) -> dict[str, Any]:
    """Ends the run in order, judges the replay that it leaves, and returns the fields of a row that say the result."""
    code, stop_seconds = driver.stop()
    orphan_seconds = driver.orphan_seconds()
    config = RunDirectory.open(driver.run_dir).config
    saved = saved_replay(Checkpoints(driver.run_dir / "checkpoints", run_id=None).restore_item("replay"))
    verdict = witness.judge(saved, config)
    lost = re.findall(r"held (\d+) transitions; (\d+) are back", driver.log)
    return {
        "restarts": json.loads((driver.run_dir / "summary.json").read_text())["num_restarts"],
        "transitions_lost": sum(int(held) - int(found) for held, found in lost),
        "transitions_back": sum(int(found) for _, found in lost),
        "exit_code": code,
        "stop_seconds": stop_seconds,
        "orphan_seconds": orphan_seconds,
        "rows": verdict.num_rows,
        "writers": verdict.num_writers,
        "cuts": verdict.num_cuts,
        "oracle": "; ".join(verdict.faults) or "ok",
    }


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


if __name__ == "__main__":
    main()
