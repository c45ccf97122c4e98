"""Equal processes learn what one process does, and a run goes on in another number of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from small_all_reduce import SETTINGS, config_for, params_of

import qfleet
from qfleet.config import AllReduceConfig


@pytest.mark.slow
def test_four_processes_learn_what_one_does(tmp_path: Path) -> None:
    alone = qfleet.make_config("CartPole-v1", "pqn", run_dir=str(tmp_path / "alone"), **SETTINGS)
    expected = qfleet.train(alone)
    summary = qfleet.train(config_for(tmp_path / "four", 4))
    assert summary["stopped"] == "env steps" and summary["num_restarts"] == 0
    assert summary["learner_steps"] == expected["learner_steps"]
    for found, wanted in zip(params_of(tmp_path / "four"), params_of(tmp_path / "alone"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_began_in_one_process_goes_on_as_equal_processes_and_in_another_number(tmp_path: Path) -> None:
    """So do its replay, counters and schedules; the environments are outside the compiled program."""
    run_dir = tmp_path / "run"
    settings = {"num_envs": 8, "replay_capacity": 2000, "warmup_env_steps": 500, "batch_size": 32, **SETTINGS}
    settings |= {"env_steps": 1024, "run_dir": str(run_dir)}
    begun = qfleet.train(qfleet.make_config("gym:CartPole-v1", "rainbow_lite", "overlapped", **settings))
    topology = AllReduceConfig(num_envs=8, num_processes=2, silence_seconds=120)
    run = qfleet.resume(run_dir, env_steps=10**6, topology=topology)
    messages = iter(run)
    assert next(messages).env_steps > begun["env_steps"]
    while next(messages).env_steps < begun["env_steps"] + 1024:
        pass
    messages.close()  # as leaving a loop does: the run stops in order
    first = json.loads((run_dir / "summary.json").read_text())
    assert first["stopped"] == "interrupted" and first["topology"] == "all-reduce"
    assert first["learner_steps"] > begun["learner_steps"]
    until = first["env_steps"] + 1024
    resumed = qfleet.resume(run_dir, env_steps=until, topology=dataclasses.replace(topology, num_processes=1))
    records = list(resumed)
    assert records[0].env_steps > first["env_steps"] and records[0].learner_steps > first["learner_steps"]
    assert resumed.summary["env_steps"] == until
    per_step = first["learner_steps"] / (first["env_steps"] - 500)
    assert resumed.summary["learner_steps"] == pytest.approx(per_step * (until - 500), rel=0.05)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["env_steps"] for line in lines]
    assert steps == sorted(steps) and len(set(steps)) == len(steps)
