"""What happens to a fleet that loses processes: it goes on, its replay stays sound, and it ends in order."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import witness

import qfleet
from qfleet.config import TrainConfig
from qfleet.core.replay import CONTINUED
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_directory import RunDirectory
from qfleet.topologies.fleet.actor import Actor
from qfleet.topologies.fleet.replay_shard import ReplayShard, Writer
from qfleet.topologies.fleet.replay_shares import join_shards
from qfleet.topologies.restoring import saved_replay

pytest.importorskip("ray")

from qfleet.topologies.fleet import director as director_module

TESTS = Path(__file__).resolve().parents[2]

SETTINGS: dict[str, Any] = {
    "num_actors": 2, "lanes_per_actor": 2, "num_replay_shards": 2, "rows_per_chunk": 8, "hidden_sizes": (16,),
    "replay_capacity": 400_000, "warmup_env_steps": 64, "n_step": 3, "replay": "prioritised", "batch_size": 32,
    "env_steps_per_learner_step": 16.0, "env_steps": 100_000_000, "eval_period_env_steps": 100_000_000,
}  # fmt: skip

SMALLEST = {"num_actors": 1, "num_replay_shards": 1}


def config_of(**settings) -> TrainConfig:
    return qfleet.make_config("witness:Witness-v0", "dqn", "actor-learner", **{**SETTINGS, **settings})


# --- The judge ---


def test_the_judge_finds_what_a_fault_could_do_to_a_replay():
    """What an actor and its successor leave, with a chunk missing, is sound; each damage to it is found."""
    config = config_of(num_replay_shards=1, replay_capacity=1600)
    network = make_network(make_env(config.env).spec, config.agent)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(network.init(jax.random.key(0)))]
    actor, shard = Actor(config, 1), ReplayShard(config, 0)
    for writer in [Writer(0, 0), Writer(0, 1), Writer(0, 3), Writer(1, 0), Writer(1, 1)]:  # not 0, 2
        if writer.num_chunks == 0:
            actor.begin(writer.incarnation)
        actor.receive(1, leaves)
        chunk = actor.collect(0.1)[1]
        chunk = actor.collect(0.1)[1] if writer == Writer(0, 3) else chunk
        shard.insert(1, writer, chunk)
    saved = join_shards([shard.snapshot()], config.topology.actor_pool)
    verdict = witness.judge(saved, config)
    assert verdict == (80, 4, 4, ())

    def faults(name: str, change: Callable[[np.ndarray], None]) -> str:
        rows = saved.ring.rows
        column = np.array(getattr(rows, name))
        change(column)
        damaged = saved._replace(ring=saved.ring._replace(rows=rows._replace(**{name: column})))
        return " ".join(witness.judge(damaged, config).faults)

    def put(rows: slice, lane: int, value: Any) -> Callable[[np.ndarray], None]:
        def change(column: np.ndarray) -> None:
            column[rows, lane] = value

        return change

    obs = np.asarray(saved.ring.rows.obs)
    assert "stitched" in faults("outcome", put(slice(14, 16), 2, CONTINUED))
    assert "out of order" in faults("obs", put(slice(8, 16), 3, obs[:8, 3]))  # a chunk that came twice
    assert "another actor's or lane's" in faults("obs", put(slice(0, 40), 2, obs[:40, 3]))
    assert "had been left" in faults("obs", put(slice(32, 40), 2, obs[:8, 2]))
    assert "another reward" in faults("reward", put(slice(0, 1), 2, 7.0))


# --- Fleets ---


class Driver:
    """A `qfleet` process in a session of its own."""

    def __init__(self, folder: Path, *words: str, **flags: Any) -> None:
        self.run_dir, self.log_path = folder / "run", folder / "log"
        command = [sys.executable, "-m", "qfleet", *words, "--quiet"]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        path = os.pathsep.join(filter(None, [str(TESTS), *sys.path]))
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log, start_new_session=True
            )

    def parts(self, kind: str = "Remote") -> list[int]:
        """Returns the IDs of its remote processes of a kind."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                session = int((path / "stat").read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid and (path / "cmdline").read_text().startswith(f"ray::{kind}"):
                    found.append(int(path.name))
            except OSError:  # it has ended
                continue
        return found

    def records(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def wait_until_whole(self, restarts: int = 0) -> None:
        """Returns once so many processes have been replaced, and all are at work."""
        num_records, num_replaced = len(self.records()), None

        def is_whole() -> bool:
            nonlocal num_replaced
            assert self.process.poll() is None
            new = self.records()[num_records:]
            if num_replaced is None:
                num_replaced = next((i for i, record in enumerate(new) if record["fleet_restarts"] >= restarts), None)
                return False
            since = new[num_replaced + 1 :]  # on a busy machine not all of it happens within one of them
            are_there = [record for record in since if record["fleet_actors_ready"] == SETTINGS["num_actors"]]
            act = any(record["fleet_actor_env_steps_per_second_min"] > 0 for record in are_there)
            return act and any(record["learner_steps_per_second"] > 0 for record in are_there)

        self.wait_for(is_whole)

    def wait_for(self, is_it: Callable[[], bool]) -> None:
        """Returns once it is so; where it never is, the test's own time runs out."""
        while not is_it():
            time.sleep(0.05)

    def wait_until_saved(self) -> None:
        """Returns once there is a checkpoint of what has happened until now."""
        checkpoints, env_steps = Checkpoints(self.run_dir / "checkpoints", run_id=None), self.records()[-1]["env_steps"]

        def is_saved() -> bool:
            assert self.process.poll() is None
            return (checkpoints.latest() or 0) > env_steps

        self.wait_for(is_saved)

    def end(self) -> None:
        """Ends all of it, and shows what it said, for a test that fails."""
        print(self.log_path.read_text())
        for pid in (self.process.pid, *self.parts("")):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    drivers = []

    def start(*words: str, **flags: Any) -> Driver:
        drivers.append(Driver(tmp_path, *words, **flags))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


def train(drive: Callable[..., Driver], folder: Path, **flags: Any) -> Driver:
    flags = {**SETTINGS, "preset": "dqn", "topology": "actor-learner", "run_dir": folder / "run", **flags}
    return drive("train", "witness:Witness-v0", **flags)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fleet_survives_the_loss_of_each_of_its_processes_and_its_replay_is_sound(drive, tmp_path: Path) -> None:
    driver = train(drive, tmp_path, checkpoint_period_seconds=0.5)
    driver.wait_until_whole()
    for restarts, kind in enumerate(("RemoteActor", "RemoteReplayShard", "RemoteLearner"), start=1):
        os.kill(driver.parts(kind)[0], signal.SIGKILL)
        driver.wait_until_whole(restarts)
        driver.wait_until_saved()  # or what comes next would hide it: lost parts go on from the newest checkpoint

    driver.process.kill()
    driver.process.wait()
    driver.wait_for(lambda: not driver.parts())
    driver = drive("resume", str(driver.run_dir), "--trust")
    driver.wait_until_whole()

    os.kill(driver.parts("RemoteActor")[0], signal.SIGSTOP)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.wait() == 0
    driver.wait_for(lambda: not driver.parts())

    summary = json.loads((driver.run_dir / "summary.json").read_text())
    assert summary["stopped"] == "interrupted"
    saved = saved_replay(Checkpoints(driver.run_dir / "checkpoints", run_id=None).restore_item("replay"))
    verdict = witness.judge(saved, RunDirectory.open(driver.run_dir).config)
    assert not verdict.faults and verdict.num_cuts >= 6 and verdict.num_rows > 1000, verdict


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_lost_too_often_fails_the_run_which_can_be_resumed(drive, tmp_path: Path) -> None:
    driver = train(drive, tmp_path, checkpoint_period_seconds=1.0, max_restarts=0, **SMALLEST)
    checkpoints = Checkpoints(driver.run_dir / "checkpoints", run_id=None)
    driver.wait_for(
        lambda: checkpoints.latest() is not None and checkpoints.read_metadata()["counters"]["learner_steps"] > 0
    )
    os.kill(driver.parts("RemoteLearner")[0], signal.SIGKILL)
    assert driver.process.wait() == 1
    assert "learner died; it has failed 1 times within 10 minutes" in driver.log_path.read_text()
    summary = json.loads((driver.run_dir / "summary.json").read_text())
    assert summary["stopped"] == "failed" and "max_restarts=0" in summary["error"]
    driver.wait_for(lambda: not driver.parts())
    checkpoints.restore_item("learner"), checkpoints.restore_item("replay")


@pytest.mark.slow
def test_a_checkpoint_counts_the_steps_of_the_learner_that_it_holds(tmp_path: Path, monkeypatch, caplog) -> None:
    """And if the learner finds no node, there is no checkpoint, and the run goes on."""
    run = qfleet.iterate(config_of(run_dir=str(tmp_path / "run"), checkpoint_period_seconds=1e6, **SMALLEST))
    topology: Any = run._topology
    learner = topology._director._learner

    def lose() -> None:
        process = learner.place[0]
        os.kill(process, signal.SIGKILL)
        while learner.place is not None and learner.place[0] == process:
            time.sleep(0.01)

    progress = iter(run)
    while next(progress).learner_steps < 50:
        pass
    monkeypatch.setattr(director_module, "_LOST_SECONDS", math.inf)
    lose()
    assert topology.state and topology.learner_steps == topology.counters["learner_steps"] == 0

    next(progress)  # for a fleet that rests asks nothing of anybody
    lose()
    monkeypatch.setattr(director_module, "_LOST_SECONDS", 0.0)
    run._saving.save(run._notes())
    assert "there is no checkpoint at environment step" in caplog.text and "learner is lost" in caplog.text
    monkeypatch.undo()
    while next(progress).new_learner_steps == 0:
        pass
    progress.close()
    assert run.summary["num_restarts"] == 2
