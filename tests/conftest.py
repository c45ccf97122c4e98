"""Shared by all tests: they run on the CPU, and keep their compiled programs apart from the user's cache."""

import gc
import itertools
import os
import signal
from pathlib import Path

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

    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # a plugin of pytest may have imported JAX before
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)  # so that meshes can be tried without any hardware

    enable_compilation_cache()  # most of a test's time is compilation, so a second run takes a third of the time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that hold slow tests, so that no process is left alone with one at the end.

    Each is followed by two others, because two tests on Ray at once take longer than one after the other.
    """
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    slow = [file for file in by_file.values() if any(item.get_closest_marker("slow") for item in file)]
    others = iter([file for file in by_file.values() if file not in slow])
    groups = [[file, *itertools.islice(others, 2)] for file in slow]
    items[:] = [item for group in [*groups, list(others)] for file in group for item in file]
