"""How XLA uses the cores and the memory of a CPU."""

import ctypes
import os
import sys
from collections.abc import Sequence

import jax

from qfleet.runtime.process import available_memory_bytes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

SMALL = 50_000
"""Parameters up to which one thread is faster than several: on two cores a learner step of 5,000 parameters takes
80 us with one thread and 110 us with two, which spend the difference handing tiny operations to each other."""


def limit_cpu_threads(num_parameters: int) -> None:
    """Leaves XLA one thread per CPU device if the network is small, unless the user has set `PJRT_NPROC`.

    XLA decides once, when JAX is first used: call it before.
    """
    if num_parameters <= SMALL:
        os.environ.setdefault("PJRT_NPROC", "1")


def split_cpu(num_seeds: int) -> None:
    """Makes one CPU device per core, as far as independent learners divide over them. To call before JAX is used."""
    set_cpu_devices(num_shards(num_seeds, os.cpu_count() or 1))


def set_cpu_devices(count: int) -> None:
    """Makes so many devices of the CPU, as if each were one of its own. To call before JAX is used."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # JAX is in use already, in a notebook say: its devices stay as they are, and serve as well


def use_cpu_only() -> None:
    """Keeps this process off accelerators. To call before JAX is used."""
    jax.config.update("jax_platforms", "cpu")


def compute_in_line() -> None:
    """Has programs for the CPU run in the thread that calls them. To call before JAX is used.

    By default another thread does, which helps only who goes on meanwhile: a step of an actor that waits for its action
    takes 1.6 times the CPU so.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def reuse_freed_memory() -> None:
    """Has the C library keep memory that is freed, for the next program's temporaries.

    A program of convolutions takes and frees some 60 MB at each call. By default such blocks go back to the system and
    come back as fresh pages: 9 of the 22 ms of a learner step of the Nature network, batch 32, on two cores. Only
    glibc does so, and only it has this switch.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def memory_bytes(device: jax.Device) -> int | None:
    """Returns the memory of a device that arrays may take, in bytes; None where it doesn't tell, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def available_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the memory that each of these devices may take, in bytes; None where nobody can tell.

    Devices of a CPU share what the host has left; those of several processes are taken to be of one host.
    """
    if devices[0].platform == "cpu":
        host = available_memory_bytes()
        return None if host is None else host // len(devices)
    own = [device for device in devices if device.process_index == jax.process_index()]
    known = [limit for device in own if (limit := memory_bytes(device)) is not None]
    return min(known) if known else None


def describe_memory(devices: Sequence[jax.Device]) -> str:
    """Returns whose memory `available_bytes` tells."""
    if devices[0].platform != "cpu":
        return f"{devices[0].device_kind}, what JAX may take of it"
    if len(devices) == 1:
        return "what the host has available"
    return f"{len(devices)} CPU devices share what the host has available"


def num_cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_shards(num_seeds: int, num_devices: int) -> int:
    """Returns the most devices, up to `num_devices`, over which the learners divide evenly."""
    return max(n for n in range(1, min(num_seeds, num_devices) + 1) if num_seeds % n == 0)
