"""Equal processes that are started by hand find each other, and go on by hand."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_all_reduce import peers_of

from qfleet.topologies.all_reduce.processes import free_port


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
