"""Facts that the operating system knows about this process: its age and its memory."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qfleet.config import ConfigError

MIN_OPEN_FILES = 128
"""Least limit on open files under which a run starts. Linux and macOS allow at least twice as many by default."""

_IMPORTED = time.monotonic()


def seconds_since_process_start() -> float:
    """Returns the age of this process, including the start of the interpreter and imports.

    Linux reports it to 1/100 s. On other systems the age counts from the first import of this module.
    """
    if not sys.platform.startswith("linux"):
        return time.monotonic() - _IMPORTED
    # The second field is the program's name in parentheses, which may contain spaces. The fields after it don't.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # `starttime`, clock ticks since boot
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process so far, in bytes. 0 if the system doesn't report it."""
    if sys.platform.startswith("linux"):
        # `ru_maxrss` would not do, because a process inherits it from the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_can_open_files() -> None:
    """Raises ConfigError if this process may open fewer files at once than a run needs."""
    if sys.platform == "win32":
        return
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < MIN_OPEN_FILES:
        raise ConfigError(
            f"a run must be allowed to open {MIN_OPEN_FILES} files at once, got a limit of {most}; raise it in the "
            f"shell, with `ulimit -n 1024`"
        )


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Returns the memory that this process may still take without swapping, in bytes. None if it is unknown.

    This is the memory that the kernel reports as available, or less if the process's control groups have lower limits.

    Args:
      root: root of the file system. Tests use another.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([available, *_left_by_control_groups(root)]))


def total_memory_bytes() -> int | None:
    """Returns the memory of this machine in bytes. None if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """Returns the lowest memory limit of the process's control groups in bytes. None if there is none.

    Args:
      root: as for `available_memory_bytes`.
    """
    limits = []
    for folder, name, _, _ in _memory_groups(root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((folder / name).read_text()))
    lowest = min(limits, default=_NO_LIMIT)
    return None if lowest >= _NO_LIMIT else lowest


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns the number of cores whose time the process's control groups allow. None if they don't limit it.

    Args:
      root: as for `available_memory_bytes`.
    """
    quotas = []
    for folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas.append(int(quota) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)  # version 1 writes -1 for no limit


def show_bytes(count: int) -> str:
    """Returns a number of bytes in words: three digits, in units of powers of 1000."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.{0 if unit == 'B' or size >= 99.95 else 1 if size >= 9.995 else 2}f} {unit}"


_NO_LIMIT = 2**60
"""Bytes from which on a limit is none. Control groups of version 1 write the largest number of pages."""


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """Yields the bytes that each memory limit on this process leaves free, from control groups version 2 and 1."""
    for group in _memory_groups(root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            yield _left_by(*group)


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yields each control group with the names of its limit, its usage, and its cached files in memory.stat."""
    for folder in _groups(root, "memory"):
        if (folder / "memory.limit_in_bytes").exists():
            yield folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            yield folder, "memory.max", "memory.current", "inactive_file"


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the control groups of this process with a controller, and those further up, whose limits apply too."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            top = root / "sys/fs/cgroup"  # version 2
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == top or top in folder.parents)


def _left_by(folder: Path, limit: str, usage: str, cached: str) -> int:
    """Returns the bytes that a control group's limit leaves free. Cached files count as free: the kernel drops them."""
    most, used = (int((folder / name).read_text()) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return most - used + int(stat.get(cached, 0))
