"""Settings of JAX devices: which ones XLA uses, with how many threads and how much memory."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from qfleet.config import ConfigError, RunFailed
from qfleet.runtime.process import available_memory_bytes
from qfleet.runtime.workarounds.jax_backends import has_started

SMALL = 50_000
"""Number of parameters up to which one thread is faster than several.

On two cores a learner step of 5,000 parameters takes 80 us with one thread and 110 us with two. Two threads spend the
difference on handing tiny operations to each other."""


_is_forked = False  # whether this process was forked from one that had started JAX


def _note_fork() -> None:
    global _is_forked
    _is_forked = has_started()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def check_not_forked() -> None:
    """Checks that JAX can compute in this process. In a process that was forked after JAX had started, it hangs.

    Raises:
      ConfigError: if it can't.
    """
    if _is_forked:
        raise ConfigError(
            f"JAX must start in the process that uses it, got process {os.getpid()}, which was forked from one that "
            f"had started JAX and would hang; start processes with multiprocessing.get_context('spawn'), or with "
            f"mp_context=multiprocessing.get_context('spawn') for concurrent.futures"
        )


_UNFIT = {
    "jax_numpy_rank_promotion": ("raise",),
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_transfer_guard": ("disallow", "disallow_explicit"),
    "jax_transfer_guard_host_to_device": ("disallow", "disallow_explicit"),
    "jax_transfer_guard_device_to_host": ("disallow", "disallow_explicit"),
}
"""Settings of JAX, and their values with which it refuses what the programs here do."""


@contextlib.contextmanager
def clear_platform_errors() -> Iterator[None]:
    """Raises a ConfigError with the remedy if JAX can't be used as this process and its variables are set up.

    Use it around the beginning of a run, or as a decorator. It doesn't start JAX by itself.

    Raises:
      ConfigError: if JAX computes in 64 bits, is set to refuse what programs here do, finds no device, or was started
        before this process was forked.
    """
    check_not_forked()
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ConfigError(
            "qfleet computes in 32 bits, got jax_enable_x64; unset JAX_ENABLE_X64, or call qfleet within "
            "`with jax.enable_x64(False):`"
        )
    for name, values in _UNFIT.items():
        if (value := getattr(jax.config, name)) in values:
            raise ConfigError(
                f"qfleet can't compute with {name}={value}; unset {name.upper()}, or give jax.config.update its default"
            )
    try:
        yield
    except (ConfigError, RunFailed):
        raise
    except (RuntimeError, AssertionError) as error:  # of whatever used JAX first
        if reason := _why_no_devices():
            raise ConfigError(reason) from error
        raise


def check_platforms_of_children() -> None:
    """Checks that a process started with this one's variables would find its devices, without starting JAX here.

    Raises:
      ConfigError: if `JAX_PLATFORMS` names others than the CPU, and JAX doesn't find them.
    """
    if os.environ.get("JAX_PLATFORMS", "cpu") not in ("", "cpu"):
        command = [sys.executable, "-P", "-c", "import jax; jax.devices()"]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode != 0:
            raise ConfigError(_no_devices(found.stderr.strip().rpartition("\n")[2].partition(": ")[2]))


def _why_no_devices() -> str | None:
    """Returns the reason why JAX can't start, with the remedy; None if it can."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        return _no_devices(str(error))
    return None


def _no_devices(error: str) -> str:
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    detail = error.partition(" (")[0].strip(" .") or "there is no such device"
    if platforms:
        given, remedy = f"JAX_PLATFORMS={platforms}", "unset JAX_PLATFORMS, or set JAX_PLATFORMS=cpu"
    else:
        given, remedy = "no JAX_PLATFORMS", "set JAX_PLATFORMS=cpu to do without the device that fails"
    return (
        f"JAX must find the devices that it is told to use, got {given}: {detail}; {remedy}; for NVIDIA GPUs, "
        f"install qfleet's extra `cuda`, and let nvidia-smi show the GPU"
    )


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


def describe_devices() -> list[dict[str, Any]]:
    """Returns the kinds of devices that JAX sees, as JSON can hold them: platform, kind, count, and memory of each."""
    kinds: dict[tuple[str, str, int | None], int] = {}
    for device in jax.devices():
        is_ours = device.process_index == jax.process_index()  # only a process itself knows its devices' memory
        kind = (device.platform, device.device_kind, memory_bytes(device) if is_ours else None)
        kinds[kind] = kinds.get(kind, 0) + 1
    return [
        {"platform": platform, "kind": kind, "count": count, "memory_bytes": memory}
        for (platform, kind, memory), count in kinds.items()
    ]


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


def num_shards(num_seeds: int, num_devices: int) -> int:
    """Returns the greatest number of devices, at most `num_devices`, over which the learners divide evenly."""
    return max(n for n in range(1, min(num_seeds, num_devices) + 1) if num_seeds % n == 0)


def lack_of_memory(error: BaseException) -> str | None:
    """Returns what to say if an error means that memory ran out, or None. XLA has no type for such an error."""
    if not any(words in str(error) for words in ("Out of memory", "RESOURCE_EXHAUSTED")):
        return None
    reason = str(error).splitlines()[0].rstrip(".")
    return f"a run must fit into memory, got {reason}; give a smaller replay_capacity, num_envs or num_seeds"
