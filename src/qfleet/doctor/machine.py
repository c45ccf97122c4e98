"""Checks of the machine: threads, memory, open files, disk, shared memory."""

import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from qfleet.config.lane_options import num_cores
from qfleet.doctor.check import Check, Verdict
from qfleet.runtime.process import (
    MIN_OPEN_FILES,
    available_memory_bytes,
    cpu_quota,
    memory_limit_bytes,
    show_bytes,
    total_memory_bytes,
)

_MEMORY_BYTES = 700 * 10**6
"""Memory that the process of a small run takes at its peak, with JAX and a compilation: 690 MB in CartPole-v1."""

_DISK_BYTES = 10**8
"""Space below which a run can't keep a few checkpoints with a replay, metrics and a report."""

_ROOMY_DISK_BYTES = 2 * 10**9

_OPEN_FILES = 1024
"""Limit on open files that systems set by default. Fleets and many environment workers come close to less."""

_SHM_BYTES = 10**9
"""Room in /dev/shm from which on Ray keeps its object store there. Containers have 64 MB by default."""

_WRITTEN_BYTES = 16 * 2**20
_WRITING_SECONDS = 0.5
_SLOW_BYTES_PER_SECOND = 5 * 10**6

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "PJRT_NPROC", "XLA_FLAGS")


def threads(root: Path = Path("/")) -> Check:
    """Compares the cores with the limits on their use, and with variables that set numbers of threads.

    Args:
      root: root of the file system. Tests use another.
    """
    cores, quota = num_cores(), cpu_quota(root)
    variables = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    facts = {"cpu_cores": os.cpu_count(), "usable_cores": cores, "cpu_quota": quota, "variables": variables}
    words = f"{cores} CPU core{'s' * (cores != 1)}"
    if cores != os.cpu_count():
        words += f" of {os.cpu_count()}"
    if quota is not None and quota < cores:
        words += f", of whose time the control group allows {quota:g} cores'"
    words += "".join(f", {name}={value}" for name, value in variables.items())
    for name in ("OMP_NUM_THREADS", "PJRT_NPROC"):
        number = variables.get(name, "1").split(",")[0]  # OMP_NUM_THREADS may give one for each level
        if not re.fullmatch(r"\s*[1-9]\d{0,5}\s*", number):
            return Check("threads", "warn", f"{words}; {name} is no number of threads", f"unset {name}", facts)
        if name in variables and int(number) > cores:
            text = f"{words}; {name} asks for more threads than there are cores"
            return Check("threads", "warn", text, f"set {name}={cores}, or unset it", facts)
    if quota is not None and math.ceil(quota) < cores and "PJRT_NPROC" not in variables:
        most = max(1, math.floor(quota))
        remedy = f"set PJRT_NPROC={most}, or give the container whole cores (docker run --cpuset-cpus)"
        text = f"{words}; XLA starts a thread for each core, and the kernel stops all of them in turn"
        return Check("threads", "warn", text, remedy, facts)
    return Check("threads", "good", words, facts=facts)


def memory(root: Path = Path("/")) -> Check:
    """Says how much memory a run may still take."""
    total, limit, available = total_memory_bytes(), memory_limit_bytes(root), available_memory_bytes(root)
    facts = {"total_bytes": total, "limit_bytes": limit, "available_bytes": available}
    if available is None:
        return Check("memory", "good", "this system doesn't say how much memory is available", facts=facts)
    words = f"{show_bytes(available)} available"
    if total is not None:
        words += f" of {show_bytes(total)}"
    if limit is not None and (total is None or limit < total):
        words += f", and the control group's limit is {show_bytes(limit)}"
    if available >= 2 * _MEMORY_BYTES:
        return Check("memory", "good", words, facts=facts)
    verdict: Verdict = "bad" if available < _MEMORY_BYTES else "warn"
    text = f"{words}; a small run takes {show_bytes(_MEMORY_BYTES)}"
    remedy = "end other programs, raise the container's limit, or give a smaller --replay-capacity and --num-envs"
    return Check("memory", verdict, text, remedy, facts)


def open_files() -> Check:
    """Says how many files a process may have open."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    facts = {name: None if math.isinf(limit) else limit for name, limit in (("limit", soft), ("most", hard))}
    words = "no limit" if math.isinf(soft) else f"{soft:,} at once"
    if soft >= _OPEN_FILES:
        return Check("open files", "good", words, facts=facts)
    most = min(hard, 4 * _OPEN_FILES)
    remedy = f"`ulimit -n {most}` in the shell that starts runs"
    if most <= soft:
        remedy = "let the administrator raise the hard limit (`nofile` in /etc/security/limits.conf)"
    if soft < MIN_OPEN_FILES:
        return Check("open files", "bad", f"{words}; a run needs {MIN_OPEN_FILES}", remedy, facts)
    return Check("open files", "warn", f"{words}; a run with many processes may need more", remedy, facts)


def disk() -> Check:
    """Writes a file where runs go, for at most half a second, and says how fast, and how much room there is."""
    folder = Path("runs").absolute()
    while not folder.is_dir():
        folder = folder.parent
    elsewhere = "give --run-dir a folder on another disk"
    try:
        usage = shutil.disk_usage(folder)
        speed = _bytes_per_second(folder)
    except OSError as error:
        text = f"runs go to {folder / 'runs'}, where no file can be written ({error.strerror})"
        return Check("disk", "bad", text, f"{elsewhere}, or change to another folder", {"folder": str(folder)})
    facts = {"folder": str(folder), "free_bytes": usage.free, "total_bytes": usage.total, "bytes_per_second": speed}
    words = (
        f"{show_bytes(usage.free)} free of {show_bytes(usage.total)} in {folder}, {show_bytes(int(speed))}/s to write"
    )
    if usage.free < _DISK_BYTES:
        return Check("disk", "bad", words, f"make room, or {elsewhere}", facts)
    if usage.free < _ROOMY_DISK_BYTES:
        remedy = f"make room, {elsewhere}, or give --no-checkpoint-replay, which keeps checkpoints small"
        return Check("disk", "warn", words, remedy, facts)
    if speed < _SLOW_BYTES_PER_SECOND:
        remedy = f"{elsewhere}, or a larger --checkpoint-period-seconds"
        return Check("disk", "warn", f"{words}, which is slow", remedy, facts)
    return Check("disk", "good", words, facts=facts)


def shared_memory(shm: Path = Path("/dev/shm")) -> Check:
    """Tries the memory that processes of a run on this machine share, and says how much room Ray's own has.

    Args:
      shm: folder of POSIX shared memory. Tests use another.
    """
    from qfleet.topologies.fleet.shared_memory import can_share

    shares = can_share()
    room = shutil.disk_usage(shm).total if shm.is_dir() else None
    facts: dict[str, Any] = {"memfd": shares, "shm_bytes": room}
    words = f"memfd {'works' if shares else 'is missing or forbidden'}, "
    words += f"{shm} is missing" if room is None else f"{shm} has room for {show_bytes(room)}"
    if not shares:
        text = f"{words}; the processes of a fleet then exchange everything through Ray, which is slower"
        return Check("shared memory", "warn", text, "allow memfd_create in the container's seccomp profile", facts)
    if room is None or room < _SHM_BYTES:
        text = f"{words}; Ray's object store, in a cluster, then goes to a disk"
        return Check("shared memory", "warn", text, "start the container with --shm-size=2g", facts)
    return Check("shared memory", "good", words, facts=facts)


def _bytes_per_second(folder: Path) -> float:
    block, written = os.urandom(2**20), 0
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        while written < _WRITTEN_BYTES and time.monotonic() - began < _WRITING_SECONDS:
            file.write(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
        return written / max(time.monotonic() - began, 1e-6)
