"""No process of an all-reduce run that dies, hangs or is left behind goes unnoticed."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from other_processes import command_of, wait_until
from small_all_reduce import config_for, params_of, peers_of

import qfleet
from qfleet.runtime.checkpoints import Checkpoints


@pytest.mark.slow
def test_a_killed_process_costs_what_came_after_the_newest_checkpoint(tmp_path: Path, caplog) -> None:
    run_dir = tmp_path / "run"
    config = config_for(run_dir, 2, env_steps=10**8, checkpoint_period_seconds=1e-9)
    run, checkpoints, pid = qfleet.iterate(config), Checkpoints(run_dir / "checkpoints", run_id=None), None
    with contextlib.closing(iter(run)) as records:
        for progress in records:
            if pid is None and checkpoints.latest():
                pid, killed_at = peer_pid(run_dir, 1), progress.env_steps
                os.kill(pid, signal.SIGKILL)
            elif pid is not None and "was killed" in caplog.text and progress.env_steps > killed_at:
                break
    assert "process 1 of 2 was killed by SIGKILL" in caplog.text
    assert run.summary["num_restarts"] == 1 and run.summary["stopped"] == "interrupted"
    env_steps = run.summary["env_steps"]
    assert int(re.findall(r"start again from environment step (\d+)", caplog.text)[0]) > 0
    undisturbed = tmp_path / "undisturbed"
    qfleet.train(dataclasses.replace(config, env_steps=env_steps, run_dir=str(undisturbed)))
    for found, wanted in zip(params_of(run_dir), params_of(undisturbed), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def peer_pid(run_dir: Path, number: int) -> int:
    found = [pid for pid in peers_of(run_dir) if f"--process-id={number}" in command_of(pid)]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_nothing_is_left_behind_when_the_launcher_is_killed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ["--topology=all-reduce", "--num-processes=2", "--env-steps=100000000", "--silence-seconds=300"]
    command = [sys.executable, "-m", "qfleet", "train", "CartPole-v1", *flags, "--run-dir", str(run_dir)]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        metrics = run_dir / "metrics.jsonl"
        wait_until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or launcher.poll() is not None)
        assert launcher.poll() is None and len(peers_of(run_dir)) == 2
        os.kill(peer_pid(run_dir, 1), signal.SIGSTOP)  # not even one that can't hear of it
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not peers_of(run_dir))


def test_a_process_that_raises_ends_at_once_though_leaving_in_order_would_wait_for_the_others(tmp_path: Path) -> None:
    script = """
    import atexit, json, os, sys, time
    from qfleet.config import AllReduceConfig
    from qfleet.config.encoding import encode_topology
    import qfleet.training.peer
    from qfleet.cli import peer

    def run_peer(*arguments, **settings):
        raise ValueError("not foreseen")

    qfleet.training.peer.run_peer = run_peer
    atexit.register(time.sleep, 600)
    topology = json.dumps(encode_topology(AllReduceConfig()))
    sys.argv = ["peer", "run", "--process-id=0", f"--topology={topology}", "--coordinator=x:1", "--timeout-seconds=5"]
    sys.argv.append("--env-steps=1")
    sys.argv.append(f"--report-descriptor={os.open(os.devnull, os.O_WRONLY)}")
    peer.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "not foreseen" in done.stderr
