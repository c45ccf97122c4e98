"""The actor-learner topology on Ray."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import probes
import pytest
from small_fleets import BATCH, config_of

import qfleet
from qfleet.config import TrainConfig
from qfleet.core.replay import DrawShare, SavedReplay
from qfleet.envs.registry import make_env
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.actor_learner.learner import batches_per_round
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.replay_shard import Writer
from qfleet.topologies.restoring import saved_replay


def small(tmp_path: Path, name: str = "run", **settings) -> TrainConfig:
    return config_of(
        **{
            "env_steps": 4_096, "eval_period_env_steps": 1_024, "eval_episodes": 8, "num_actors": 2,
            "replay_capacity": 2_048, "run_dir": str(tmp_path / name), **settings,
        }
    )  # fmt: skip


@pytest.mark.slow
def test_a_fleet_learns_is_saved_and_goes_on_elsewhere_and_in_other_sizes(cluster, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "qfleet")
    settings = probes.two_choices_settings(explore=False)
    config = small(tmp_path, env_steps=3_072, replay_capacity=1_024, actor_epsilon_exponent=1.0, **settings)
    run = qfleet.iterate(config)
    records = list(run)
    summary = run.summary
    assert summary["stopped"] == "env steps" and summary["env_steps"] == 3_072
    ratio = (3_072 - 64) / summary["learner_steps"]
    assert 4.0 <= ratio < 4.3, "the rate limiter holds the replay ratio"
    assert sum(record.new_env_steps for record in records) == 3_072
    # Of three rows in the replay two begin a transition, and up to 1,024 rows are there when a record is made.
    assert any(record.fleet["replay_transitions"] > 300 for record in records)
    # A run may also warn of an evaluation that fell, which chance decides.
    assert not [record for record in caplog.records if "topologies" in record.pathname], "nothing was replaced"
    saved = replay_of(config.run_dir)
    assert saved.ring.rows.outcome.shape == (256, 4)
    summary = probes.learn_two_choices(tmp_path / "run", config.agent.discount, summary)

    def goes_on(**settings):
        run = qfleet.resume(config.run_dir, **settings)
        for progress in run:
            assert progress.env_steps >= summary["env_steps"]
        assert run.summary["learner_steps"] > summary["learner_steps"] + 200
        return run.summary

    until = summary["env_steps"] + 1_128
    summary = goes_on(env_steps=until, topology=qfleet.FusedConfig(num_envs=8))
    assert summary["topology"] == "fused" and summary["env_steps"] >= until
    smaller = dataclasses.replace(config.topology, num_actors=1, num_replay_shards=1)
    until = summary["env_steps"] + 1_100
    summary = goes_on(env_steps=until, topology=smaller)
    assert summary["topology"] == "actor-learner" and until <= summary["env_steps"] < until + 100
    summary = probes.learn_two_choices(tmp_path / "run", config.agent.discount, summary)


class Calls:
    """A supervisor whose calls are made one after the other."""

    def __init__(self, *, is_one_machine: bool) -> None:
        from qfleet.topologies.fleet.calls import Inbox
        from qfleet.topologies.fleet.supervisor import Supervisor, carrier_of

        inbox = Inbox()
        self.supervisor = Supervisor(silence_seconds=60.0, max_restarts=0)
        self.supervisor.open(inbox, carrier_of(inbox, is_one_machine=is_one_machine))

    def process(self, kind: type, *arguments: Any) -> Any:
        from qfleet.topologies.fleet.remote_process import IN_LINE, RemoteProcess

        return self.supervisor.add(RemoteProcess(kind.__name__, kind, arguments, {"CPU": 1}, IN_LINE, list))

    def ask(self, process: Any, method: Any, *arguments: Any, num_references: int = 0) -> Any:
        replies: list[Any] = []
        results = [Reference() for _ in range(num_references)]
        self.supervisor.submit(process, method, *arguments, on_reply=replies.append, results=results)
        while not replies:
            self.supervisor.wait(1.0)
            self.supervisor.process_replies()
        return replies[0]


@pytest.mark.slow
def test_the_numbers_are_the_same_whoever_carries_them(cluster):
    """From an actor to its shard, to the learner and back: by sockets and shared memory, and by Ray."""
    from qfleet.topologies.actor_learner.remote import RemoteActor, RemoteLearner
    from qfleet.topologies.fleet.remote import RemoteReplayShard
    from qfleet.topologies.fleet.remote_process import InRemoteProcess

    config = config_of(num_actors=1, num_replay_shards=1)
    size = BATCH * batches_per_round(config, make_env(config.env).spec)
    share = DrawShare(np.int32(size), np.float32(1.0), np.float32(100))

    class AllInOne(InRemoteProcess):
        """An actor, a shard and a learner in one process. What one makes for another leaves the process all the same.

        A process for each would take as long to start as all the rest of this test.
        """

        def __init__(self, variables: Mapping[str, str], config: TrainConfig) -> None:
            super().__init__(variables)
            self.parts = {
                RemoteActor: RemoteActor(variables, config, 0),
                RemoteReplayShard: RemoteReplayShard(variables, config, 0),
                RemoteLearner: RemoteLearner(variables, config),
            }

        def ask(self, part: type, method: Any, *arguments: Any) -> Any:
            return method(self.parts[part], *arguments)

    def learned(*, is_one_machine: bool) -> tuple[list[np.ndarray], SavedReplay]:
        calls = Calls(is_one_machine=is_one_machine)
        process = calls.process(AllInOne, config)

        def ask(part: type, method: Any, *arguments: Any, num_references: int = 0) -> Any:
            return calls.ask(process, AllInOne.ask, part, method, *arguments, num_references=num_references)

        ask(RemoteActor, RemoteActor.begin, 0)
        for number in range(12):
            _, params = ask(RemoteLearner, RemoteLearner.publish, num_references=1)
            _, chunk = ask(RemoteActor, RemoteActor.collect, number, params, 0.5, num_references=1)
            ask(RemoteReplayShard, RemoteReplayShard.insert, 0, Writer(0, number), chunk)
            if number < 6:
                continue
            draw = (number, 7, 0.5, share, size)
            _, batch = ask(RemoteReplayShard, RemoteReplayShard.sample_share, *draw, num_references=1)
            round_ = ([np.arange(size)], [batch])
            _, (priority,) = ask(RemoteLearner, RemoteLearner.learn, *round_, num_references=1)
            ask(RemoteReplayShard, RemoteReplayShard.set_priorities, number, priority)
        state = ask(RemoteLearner, RemoteLearner.state, num_references=1)
        replay = ask(RemoteReplayShard, RemoteReplayShard.snapshot, num_references=1)
        found = calls.supervisor.value(state), calls.supervisor.value(replay)
        calls.supervisor.terminate()
        return found

    by_channel, by_ray = learned(is_one_machine=True), learned(is_one_machine=False)
    assert len(jax.tree.leaves(by_ray)) > 10
    jax.tree.map(np.testing.assert_array_equal, by_channel, by_ray)


def replay_of(run_dir: str | None) -> SavedReplay:
    return saved_replay(Checkpoints(Path(run_dir or "") / "checkpoints", run_id=None).restore_item("replay"))


@pytest.mark.slow
def test_a_fleet_of_host_environments_learns_with_uniform_replay_which_holds_what_a_checkpoint_says(
    cluster, tmp_path, monkeypatch
):
    """The stated cut: as many environment steps are counted as rows were stored, whatever is under way."""
    from qfleet.topologies.fleet import supervisor

    monkeypatch.setattr(supervisor, "can_share", lambda: False)  # as on a cluster
    settings = {"env": "gym:CartPole-v1", "replay": "uniform", "env_steps": 2_048, "replay_capacity": 65_536}
    run = qfleet.iterate(small(tmp_path, checkpoint_period_seconds=1e-9, **settings))
    for _ in run:
        pass
    assert run.summary["env_steps"] == 2_048 and run.summary["learner_steps"] > 400
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", run_id=None)
    assert len(checkpoints.all()) > 1
    for env_steps in checkpoints.all():
        saved = saved_replay(checkpoints.restore_item("replay", env_steps=env_steps))
        assert int(np.sum(saved.ring.size)) * 2 == env_steps
        counters = checkpoints.read_metadata(env_steps)["counters"]
        assert counters["env_steps"] == env_steps
