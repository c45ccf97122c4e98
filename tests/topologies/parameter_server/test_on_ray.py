"""The parameter server on Ray."""

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import probes
import pytest
from small_servers import config_of

import qfleet
from qfleet.config import TrainConfig
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD


def sizes(**settings: Any) -> TrainConfig:
    return config_of(**{"env": "CartPole-v1", "preset": "rainbow_lite", "replay_capacity": 8192, **settings})


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_learns_is_saved_and_goes_on_elsewhere_and_in_other_sizes(cluster, tmp_path):
    path = tmp_path / "run"
    config = sizes(
        num_workers=2, num_server_shards=2, env_steps=2_600, run_dir=str(path), eval_period_env_steps=1_000,
        gradient_dtype="bfloat16", **probes.two_choices_settings(),
    )  # fmt: skip
    run = qfleet.iterate(config)
    director = run._topology._director
    with director._lock:  # a run begins with one worker, which could be at the end before the other one is there
        director._lock.wait_for(lambda: director.num_ready_actors == 2)
    for _ in run:
        pass
    summary = run.summary
    assert summary["stopped"] == "env steps" and summary["topology"] == "parameter-server"
    steps = summary["learner_steps"]
    assert steps > 500 and summary["num_restarts"] == 0
    found = records(path)
    assert max(record.get("fleet_workers_ready", 0) for record in found) == 2
    assert any(record.get("fleet_pushed_bytes_per_second", 0) > 0 for record in found)
    policy = qfleet.load(path)
    assert np.isfinite(policy.evaluate(num_episodes=2)).all()
    summary = probes.learn_two_choices(path, config.agent.discount, summary)
    steps, until = summary["learner_steps"], summary["env_steps"] + 800
    run = qfleet.resume(path, env_steps=until, topology=qfleet.config.FusedConfig(num_envs=8))
    for _ in run:
        pass
    assert run.summary["env_steps"] >= until and run.summary["learner_steps"] > steps
    steps, until = run.summary["learner_steps"], run.summary["env_steps"] + 800
    shared = dataclasses.replace(config.topology, num_workers=1, num_server_shards=1, num_replay_shards=1)
    run = qfleet.resume(path, env_steps=until, topology=shared)
    for _ in run:
        pass
    assert run.summary["topology"] == "parameter-server"
    assert run.summary["env_steps"] >= until and run.summary["learner_steps"] > steps
    probes.learn_two_choices(path, config.agent.discount, run.summary)


@pytest.mark.slow
def test_it_survives_the_loss_of_a_worker_and_of_a_shard_of_the_server(cluster, tmp_path, monkeypatch, caplog):
    from qfleet.topologies.fleet import supervisor

    monkeypatch.setattr(supervisor, "can_share", lambda: False)  # as on a cluster
    path = tmp_path / "run"
    config = sizes(
        num_workers=2, num_server_shards=2, env_steps=10**7, run_dir=str(path), checkpoint_period_seconds=1.0
    )
    run = qfleet.iterate(config)
    director = run._topology._director
    env_steps = 0

    def go_on_until(is_so: Callable[[], bool]) -> None:
        nonlocal env_steps
        while True:
            with director._lock:
                if is_so():
                    return
            progress = next(records)
            assert progress.env_steps >= env_steps, "environment steps never go back"
            env_steps = progress.env_steps

    def is_whole(version: int) -> bool:
        """Whether each worker has brought chunks since it was started, and the server was sent steps beyond that."""
        return director.version > version and all(
            worker.num_asked > CHUNKS_AHEAD for worker in director.machine.actors.each
        )

    with contextlib.closing(iter(run)) as records:
        go_on_until(lambda: is_whole(0))
        for num_restarts, name in enumerate(("worker 1", "server shard 0"), start=1):
            process = next(process for process in director._supervisor._processes if process.name == name)
            os.kill(process.place[0], signal.SIGKILL)
            go_on_until(lambda n=num_restarts: director.num_restarts == n)
            with director._lock:  # steps go back when the server does, versions never
                learner_steps, version = director.learner_steps, director.version
            go_on_until(lambda v=version: is_whole(v))
    assert run.summary["num_restarts"] == 2
    assert "server shard 0 was lost: the server goes back from learner step" in caplog.text
    assert run.summary["learner_steps"] > learner_steps, "it goes on from where it went back to"
