"""Settings of CPU devices before JAX is first used, and the memory of devices."""

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
