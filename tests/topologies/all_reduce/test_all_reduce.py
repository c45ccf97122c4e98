"""Equal processes learn what one process does, and none that dies, hangs or is left behind goes unnoticed."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from other_processes import command_of, wait_until

import qfleet
from qfleet.config import AllReduceConfig
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.all_reduce.processes import free_port

SETTINGS = {"env_steps": 4096, "eval_period_env_steps": 2048, "eval_episodes": 8}


def config_for(run_dir: Path, num_processes: int, env: str = "CartPole-v1", preset: str = "pqn", **settings):
    settings = {**SETTINGS, "run_dir": str(run_dir), "silence_seconds": 120, **settings}
    return qfleet.make_config(env, preset, "all-reduce", num_processes=num_processes, **settings)


def params_of(run_dir: Path):
    return jax.tree.leaves(jax.device_get(qfleet.load(run_dir).params))


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


def peers_of(run_dir: Path) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if "qfleet.cli.peer" in command_of(pid) and str(run_dir) in command_of(pid)]


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


@pytest.mark.slow
def test_processes_started_by_hand_find_each_other_and_go_on_by_hand(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first_port, second_port = (free_port("127.0.0.1") for _ in range(2))

    def train_by_hand() -> list[subprocess.Popen]:
        flags = {
            "topology": "all-reduce", "num-processes": 2, "coordinator": f"127.0.0.1:{first_port}",
            "env-steps": 4096, "eval-period-env-steps": 2048, "checkpoint-period-seconds": 1e-9, "run-dir": run_dir,
            "silence-seconds": 300,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [start("train", "CartPole-v1", *words, f"--process-id={number}") for number in (0, 1)]

    assert "after 4,096 environment steps" in outputs_of(train_by_hand())[0]
    with socket.create_server(("127.0.0.1", first_port)):  # where they were is no place for them any more
        elsewhere = [run_dir, f"--coordinator=127.0.0.1:{second_port}"]
        settings = [(0, 5120), (1, 6144)]
        both = [start("resume", *elsewhere, f"--process-id={i}", f"--env-steps={steps}") for i, steps in settings]
        for output in outputs_of(both, code=2):
            assert "all processes must have the same env_steps, got [5120, 6144]" in output
    words = [run_dir, "--env-steps=6144", "--checkpoint=2048"]
    second = start("resume", *words, "--process-id=1")
    first = start("resume", *words)  # the first one, with its coordinator, as recorded
    assert "after 6,144 environment steps" in outputs_of([first, second])[0]
    assert (run_dir / "checkpoints" / "4096.set-aside").exists()
    assert not peers_of(run_dir)


def start(*words) -> subprocess.Popen:
    command = [sys.executable, "-m", "qfleet", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outputs_of(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Returns what they print, once all have ended with the exit code."""
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


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
