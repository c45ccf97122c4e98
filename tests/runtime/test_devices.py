"""How the cores of a CPU are shared out, before JAX is first used."""

import os
import subprocess
import sys

import pytest

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
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=os.environ | {"JAX_PLATFORMS": "cpu"})
