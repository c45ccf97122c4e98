"""The actor-learner topology on Ray."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import probes
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


def replay_of(run_dir: str | None) -> SavedReplay:
    return saved_replay(Checkpoints(Path(run_dir or "") / "checkpoints", run_id=None).restore_item("replay"))


@pytest.mark.slow
def test_a_fleet_of_host_environments_learns_with_uniform_replay_which_holds_what_a_checkpoint_says(cluster, tmp_path):
    """The stated cut: as many environment steps are counted as rows were stored, whatever is under way."""
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
