"""Shared by all tests: they run on the CPU, and keep their compiled programs apart from the user's cache."""

import gc
import os
import signal

import pytest

NUM_DEVICES = 8
"""Number of CPU devices that JAX must see. Tests of meshes need them all; the others use the first."""


def pytest_configure(config: pytest.Config) -> None:
    """Makes these settings before the first test imports JAX. Processes that tests start inherit them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda,cpu runs the tests on a GPU
    os.environ.setdefault("QFLEET_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "xla"))
    os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's own 15, its processes starve on a busy machine
    gc.set_threshold(50_000)  # tracing makes many objects that stay, and looking through them takes 4 % of the time
    # `nohup` and shells that start the tests in the background have them, and the processes they start, ignore these.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax

    from qfleet.runtime.cache import enable_compilation_cache

    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)  # so that meshes can be tried without any hardware

    enable_compilation_cache()  # most of a test's time is compilation, so a second run takes a third of the time
