"""Settings of CPU devices before JAX is first used, and the memory of devices."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.runtime import devices


@pytest.mark.parametrize(
    ("num_seeds", "num_devices", "shards"), [(32, 2, 2), (32, 3, 2), (9, 4, 3), (7, 4, 1), (2, 8, 2), (1, 8, 1)]
)
def test_learners_are_spread_over_as_many_devices_as_divide_them(num_seeds, num_devices, shards):
    assert devices.num_shards(num_seeds, num_devices) == shards


@pytest.mark.parametrize(("size", "threads"), [(devices.SMALL, "1"), (devices.SMALL + 1, None)])
def test_only_a_small_network_gets_a_single_thread(monkeypatch, size, threads):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    devices.limit_cpu_threads(size)
    assert os.environ.get("PJRT_NPROC") == threads
    monkeypatch.delenv("PJRT_NPROC", raising=False)


def test_the_users_own_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "7")
    devices.limit_cpu_threads(1)
    assert os.environ["PJRT_NPROC"] == "7"


def test_devices_are_split_before_jax_is_used_and_left_alone_after():
    program = """if True:
        import os
        from qfleet.runtime.devices import split_cpu
        os.cpu_count = lambda: 3
        split_cpu(6)
        import jax
        assert jax.device_count() == 3, jax.devices()
        split_cpu(2)
        assert jax.device_count() == 3
    """
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


class FakeDevice:
    def __init__(self, platform, limit=None):
        self.platform, self.device_kind, self.process_index, self._limit = platform, "H100", 0, limit

    def memory_stats(self):
        return None if self._limit is None else {"bytes_limit": self._limit, "bytes_in_use": 5}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([FakeDevice("cpu")], 8000),
        ([FakeDevice("cpu")] * 4, 2000),
        ([FakeDevice("gpu", 700), FakeDevice("gpu", 600)], 600),
        ([FakeDevice("gpu")], None),
    ],
    ids=["cpu", "four of a cpu", "gpus", "gpu that doesn't tell"],
)
def test_devices_of_a_cpu_share_the_hosts_memory_and_others_have_their_own(monkeypatch, found, expected):
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: 8000)
    assert devices.available_bytes(found) == expected
    assert ("H100" in devices.describe_memory(found)) == (found[0].platform == "gpu")


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no GPU (set ...)")]
)
def test_a_platform_that_is_not_there_is_one_clear_error_before_anything_is_made(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_no_devices(*_: object) -> None:
        raise error

    monkeypatch.setattr(jax, "devices", find_no_devices)
    monkeypatch.chdir(tmp_path)
    for command in (["train", "CartPole-v1"], ["devices"], ["devices", "CartPole-v1", "--json"]):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.out == ""
        assert "JAX must find the devices that it is told to use, got JAX_PLATFORMS=" in captured.err
        assert "unset JAX_PLATFORMS, or set JAX_PLATFORMS=cpu" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["export", "run"], ["eval", "run"], ["eval", "zoo:cartpole"]])
def test_a_checkpoint_is_not_blamed_for_a_platform_that_is_not_there(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_no_devices(*_: object) -> None:
        raise AssertionError

    qfleet.train(
        qfleet.make_config(
            "CartPole-v1", "pqn", env_steps=512, hidden_sizes=(8,), eval_episodes=1, report=False,
            run_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    monkeypatch.setattr(jax, "devices", find_no_devices)
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "JAX must find the devices that it is told to use" in capsys.readouterr().err


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="of the environment"), devices.clear_platform_errors():
        raise RuntimeError("of the environment")


def test_64_bits_are_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with jax.enable_x64(True):
        assert main(["train", "CartPole-v1"]) == 2
        assert "unset JAX_ENABLE_X64" in capsys.readouterr().err
        with jax.enable_x64(False), devices.clear_platform_errors():
            pass  # the remedy that the message names
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (lambda: jax.numpy_rank_promotion("raise"), "jax_numpy_rank_promotion"),
        (lambda: jax.numpy_dtype_promotion("strict"), "jax_numpy_dtype_promotion"),
        (lambda: jax.transfer_guard("disallow"), "jax_transfer_guard"),
    ],
)
def test_settings_with_which_jax_refuses_what_programs_do_are_blamed_for_it(
    setting: Callable[[], Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with setting():
        assert main(["train", "CartPole-v1"]) == 2
    assert f"qfleet can't compute with {name}=" in (message := capsys.readouterr().err)
    assert f"unset {name.upper()}" in message and list(tmp_path.iterdir()) == []


def test_a_variable_that_jax_cannot_read_is_one_clear_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qfleet", "train", "CartPole-v1", "--run-dir", str(tmp_path / "run")]
    found = subprocess.run(command, env=os.environ | {"JAX_ENABLE_X64": "maybe"}, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "JAX must understand its variables, got: invalid truth value 'maybe' for environment" in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_child_forked_after_jax_has_started_is_told_to_use_spawn() -> None:
    program = """if True:
        import os, sys, warnings
        import jax
        from qfleet.config import ConfigError
        from qfleet.runtime import devices

        def fork():
            warnings.simplefilter("ignore")  # JAX and Python warn of the fork
            if child := os.fork():
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            try:
                devices.check_not_forked()
            except ConfigError as error:
                os._exit(1 if "spawn" in str(error) else 2)
            os._exit(0)

        devices.check_not_forked()
        assert fork() == 0, "before JAX has started, a fork is fine"
        jax.devices()
        devices.check_not_forked()
        assert fork() == 1
    """
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("name", ["train", "iterate", "resume", "load"])
def test_nothing_starts_in_such_a_child(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_is_forked", True)
    argument = qfleet.make_config("CartPole-v1", "dqn") if name in ("train", "iterate") else "no-such-run"
    with pytest.raises(qfleet.ConfigError, match=r"multiprocessing.get_context\('spawn'\)"):
        getattr(qfleet, name)(argument)


@pytest.mark.parametrize("platforms", ["cuda", "cpu,nonsense"])
def test_equal_processes_are_not_started_without_their_devices(
    platforms: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["train", "CartPole-v1", "--preset", "dqn", "--topology", "all-reduce"]) == 2
    assert "JAX must find the devices that it is told to use" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
