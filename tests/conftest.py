"""What all tests share: they run on the CPU, and keep what they compile apart from the user's cache."""

import os

import pytest

NUM_DEVICES = 8
"""CPU devices that JAX shall see: tests of meshes need them, the others use the first."""


def pytest_configure(config: pytest.Config) -> None:
    """Settles that before the first test imports JAX; processes that tests start inherit it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda,cpu runs the tests on a GPU
    os.environ.setdefault("QFLEET_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "xla"))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves its processes nothing of a busy machine
    import jax

    from qfleet.runtime.cache import enable_compilation_cache

    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)  # so that meshes can be tried without any hardware

    enable_compilation_cache()  # most of a test's time is compilation: running tests again takes a third of the time
