"""The actor-learner topology on Ray."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from small_fleets import config_of

import qfleet
from qfleet.config import TrainConfig
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.restoring import saved_replay


def small(tmp_path: Path, name: str = "run", **settings) -> TrainConfig:
    return config_of(
        **{
            "env_steps": 4_096, "eval_period_env_steps": 1_024, "eval_episodes": 8, "num_actors": 2,
            "replay_capacity": 2_048, "run_dir": str(tmp_path / name), **settings,
        }
    )  # fmt: skip


@pytest.mark.slow
def test_a_fleet_trains_is_saved_and_goes_on_in_other_sizes_and_elsewhere(cluster, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "qfleet")
    config = small(tmp_path)
    run = qfleet.iterate(config)
    records = list(run)
    summary = run.summary
    assert summary["stopped"] == "env steps" and summary["env_steps"] == 4_096
    ratio = (4_096 - 64) / summary["learner_steps"]
    assert 4.0 <= ratio < 4.3, "the rate limiter holds the replay ratio"
    assert sum(record.new_env_steps for record in records) == 4_096
    assert any(record.fleet["replay_transitions"] > 1_000 for record in records)
    # A run may also warn of an evaluation that fell, which chance decides.
    assert not [record for record in caplog.records if "topologies" in record.pathname], "nothing was replaced"
    saved = replay_of(config.run_dir)
    assert saved.ring.rows.outcome.shape == (512, 4)

    def goes_on(**settings):
        run = qfleet.resume(config.run_dir, **settings)
        for progress in run:
            assert progress.env_steps >= summary["env_steps"]
        return run.summary

    larger = dataclasses.replace(config.topology, num_actors=3, num_replay_shards=1)
    after = goes_on(env_steps=6_000, topology=larger)
    assert 6_000 <= after["env_steps"] < 6_100 and after["learner_steps"] > summary["learner_steps"] + 300
    fused = qfleet.FusedConfig(num_envs=8)
    summary = after
    after = goes_on(env_steps=8_000, topology=fused)
    assert after["topology"] == "fused" and after["learner_steps"] > summary["learner_steps"] + 300
    summary = after
    after = goes_on(env_steps=10_000)  # back, as the run began
    assert after["topology"] == "actor-learner" and after["learner_steps"] > summary["learner_steps"] + 300
    assert qfleet.load(config.run_dir) is not None


def replay_of(run_dir: str | None) -> SavedReplay:
    return saved_replay(Checkpoints(Path(run_dir or "") / "checkpoints", run_id=None).restore_item("replay"))


@pytest.mark.slow
def test_what_a_checkpoint_says_it_has_taken_its_replay_holds(cluster, tmp_path):
    """The stated cut: as many environment steps are counted as rows were stored, whatever is under way."""
    config = small(tmp_path, replay_capacity=65_536, checkpoint_period_seconds=1e-9, env_steps=6_000)
    for _ in qfleet.iterate(config):
        pass
    checkpoints = Checkpoints(Path(config.run_dir or "") / "checkpoints", run_id=None)
    assert len(checkpoints.all()) > 1
    for env_steps in checkpoints.all():
        saved = saved_replay(checkpoints.restore_item("replay", env_steps=env_steps))
        assert int(np.sum(saved.ring.size)) * 2 == env_steps
        counters = checkpoints.read_metadata(env_steps)["counters"]
        assert counters["env_steps"] == env_steps


@pytest.mark.slow
def test_a_fleet_of_host_environments_learns_with_uniform_replay(cluster, tmp_path):
    config = small(tmp_path, env="gym:CartPole-v1", replay="uniform", env_steps=2_048)
    run = qfleet.iterate(config)
    for _ in run:
        pass
    assert run.summary["env_steps"] == 2_048 and run.summary["learner_steps"] > 400


@pytest.mark.slow
def test_a_fleet_solves_cartpole(cluster, tmp_path):
    config = qfleet.make_config(
        "CartPole-v1", "rainbow_lite", "actor-learner", num_actors=4, stop_return=475.0, env_steps=200_000,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    run = qfleet.iterate(config)
    for _ in run:
        pass
    assert run.summary["stopped"] == "return reached"
