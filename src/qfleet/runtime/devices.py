"""Settings of JAX devices: which ones XLA uses, with how many threads and how much memory."""

import os
from collections.abc import Sequence

import jax

from qfleet.runtime.process import available_memory_bytes

SMALL = 50_000
"""Number of parameters up to which one thread is faster than several.

On two cores a learner step of 5,000 parameters takes 80 us with one thread and 110 us with two. Two threads spend the
difference on handing tiny operations to each other."""


def limit_cpu_threads(num_parameters: int) -> None:
    """Gives XLA one thread per CPU device if the network is small, unless the user has set `PJRT_NPROC`.

    XLA reads this variable once, when JAX is first used. So call this function before.
    """
    if num_parameters <= SMALL:
        os.environ.setdefault("PJRT_NPROC", "1")


def split_cpu(num_seeds: int) -> None:
    """Makes CPU devices for independent learners: as many as divide them evenly, and at most one per core.

    Call this before JAX is used.
    """
    set_cpu_devices(num_shards(num_seeds, os.cpu_count() or 1))


def set_cpu_devices(count: int) -> None:
    """Makes JAX present the CPU as `count` devices. Call this before JAX is used."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # JAX is already in use, for example in a notebook. It keeps its devices, and they serve as well.


def use_cpu_only() -> None:
    """Keeps this process off accelerators. Call this before JAX is used."""
    jax.config.update("jax_platforms", "cpu")


def compute_in_line() -> None:
    """Makes CPU programs run in the thread that calls them. Call this before JAX is used.

    By default JAX hands them to another thread. That helps only a caller that does something else meanwhile. An actor
    waits for its action, and its step then takes 1.6 times as much CPU time.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def memory_bytes(device: jax.Device) -> int | None:
    """Returns the memory of a device that arrays may take, in bytes. None if it is unknown, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def available_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the memory that arrays may take on each of these devices, in bytes. None if it is unknown.

    CPU devices share what the host has available. If they belong to several processes, these are assumed to run on one
    host.
    """
    if devices[0].platform == "cpu":
        host = available_memory_bytes()
        return None if host is None else host // len(devices)
    own = [device for device in devices if device.process_index == jax.process_index()]
    known = [limit for device in own if (limit := memory_bytes(device)) is not None]
    return min(known) if known else None


def describe_memory(devices: Sequence[jax.Device]) -> str:
    """Returns a description of the memory that `available_bytes` counts."""
    if devices[0].platform != "cpu":
        return f"what JAX may use of one {devices[0].device_kind}"
    if len(devices) == 1:
        return "what the host has available"
    return f"{len(devices)} CPU devices share what the host has available"


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_shards(num_seeds: int, num_devices: int) -> int:
    """Returns the greatest number of devices, at most `num_devices`, over which the learners divide evenly."""
    return max(n for n in range(1, min(num_seeds, num_devices) + 1) if num_seeds % n == 0)
