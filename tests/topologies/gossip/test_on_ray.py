"""Peers that gossip, on Ray: what a run saves, where it goes on, and lost peers."""

import contextlib
import logging
import os
import re
import signal
from typing import Any

import probes
import pytest
from small_gossip import config_of

import qfleet
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.restoring import saved_replay


@pytest.mark.slow
def test_peers_learn_are_saved_and_go_on_elsewhere_and_in_other_numbers(cluster, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "qfleet")
    settings = {"env_steps": 10**8, "eval_period_env_steps": 2_048, "replay_capacity": 120_000}
    settings |= probes.two_choices_settings()
    config = config_of("rainbow_lite", num_envs=6, run_dir=str(tmp_path / "run"), **settings)
    run = qfleet.iterate(config)
    topology: Any = run._topology
    peers, found = topology._director.machine.peers, []

    def have_met() -> bool:
        has_received = any(record.fleet["exchanged_bytes_per_second"] > 0 for record in found)
        return has_received and all(peer.learner_steps > 1_500 for peer in peers)

    with contextlib.closing(iter(run)) as records:
        while not have_met():  # for one of them may begin long before the other
            found.append(next(records))
    summary = run.summary
    assert sum(peer.env_steps for peer in peers) == summary["env_steps"] >= found[-1].env_steps
    own = [(peer.env_steps - 64) // 4 for peer in peers]
    assert [peer.learner_steps for peer in peers] == own and sum(own) // 2 == summary["learner_steps"]
    assert any(record.fleet["exchanges_per_second"] > 0 for record in found)
    assert all(record.fleet["averaging_staleness_max"] <= 2 * 48 for record in found), (
        "two chunks are under way at most"
    )
    assert 0 < found[-1].fleet["consensus_distance"] < 1 and found[-1].fleet["peers_ready"] == 2
    # A run may also warn of an evaluation that fell, which chance decides.
    assert not [record for record in caplog.records if "topologies" in record.pathname], "nothing was replaced"
    saved = saved_replay(Checkpoints(tmp_path / "run" / "checkpoints", run_id=None).restore_item("replay"))
    assert (3 * saved.ring.size).tolist() == [peer.env_steps for peer in peers]
    summary = probes.learn_two_choices(tmp_path / "run", config.agent.discount, summary)

    def goes_on(num_env_steps: int, **settings: Any) -> dict[str, Any]:
        until = summary["env_steps"] + num_env_steps
        run = qfleet.resume(config.run_dir, env_steps=until, **settings)
        taken = 0
        for progress in run:
            assert progress.env_steps >= summary["env_steps"] and progress.learner_steps >= summary["learner_steps"]
            taken += progress.new_env_steps
        assert run.summary["stopped"] == "env steps" and until <= run.summary["env_steps"] < until + 96
        assert run.summary["env_steps"] == summary["env_steps"] + taken
        assert run.summary["learner_steps"] > summary["learner_steps"] + 100
        return run.summary

    summary = goes_on(1_000, topology=qfleet.FusedConfig(num_envs=6))
    assert summary["topology"] == "fused"
    summary = goes_on(2_000, num_processes=3)  # back, but for the number of peers, as the run began
    assert summary["topology"] == "gossip"
    summary = probes.learn_two_choices(tmp_path / "run", config.agent.discount, summary)


@pytest.mark.slow
def test_the_others_go_on_when_a_peer_is_killed_and_it_comes_back_as_one_of_them_is(cluster, tmp_path, caplog):
    settings = {"env_steps": 10**8, "eval_period_env_steps": 10**8, "replay_capacity": 120_000}
    config = config_of(
        "rainbow_lite", num_envs=6, num_processes=3, checkpoint_period_seconds=1.0, run_dir=str(tmp_path / "run"),
        max_restarts=1, **settings,
    )  # fmt: skip
    run = qfleet.iterate(config)
    topology: Any = run._topology
    victim, *others = topology._director.machine.peers
    process = topology._director._processes[victim.process]
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", run_id=None)
    env_steps = learner_steps = 0
    with contextlib.closing(iter(run)) as records:

        def go_on() -> None:
            nonlocal env_steps, learner_steps
            progress = next(records)
            assert progress.env_steps >= env_steps and progress.learner_steps >= learner_steps
            env_steps, learner_steps = progress.env_steps, progress.learner_steps

        while any(peer.snapshot is None for peer in (victim, *others)):
            go_on()
        has_trained_at = env_steps
        while (checkpoints.latest() or 0) <= has_trained_at:
            go_on()
        os.kill(process.place[0], signal.SIGKILL)
        while topology._director.num_restarts == 0:
            go_on()
        with topology._director._lock:
            before = [peer.env_steps for peer in (victim, *others)]
        while any(peer.env_steps <= then for peer, then in zip((victim, *others), before, strict=True)):
            go_on()
    assert "peer 0 died, and is replaced (1 in all)" in caplog.text
    assert re.search(r"peer 0 continues from .*, as a copy of peer [12]$", caplog.text, re.MULTILINE)
    num_held, num_back = re.findall(r"peer 0 held (\d+) transitions; (\d+) are back: from", caplog.text)[0]
    assert before[0] >= int(num_held) >= int(num_back) > 0
    assert run.summary["stopped"] == "interrupted" and run.summary["num_restarts"] == 1
    assert run.summary["env_steps"] >= env_steps
