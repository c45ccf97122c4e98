"""What the operating system knows of this process: its age and its memory."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_IMPORTED = time.monotonic()


def seconds_since_process_start() -> float:
    """Returns the age of this process, interpreter start and imports included.

    Linux knows it to 1/100 s. Elsewhere the count starts when this module is first imported.
    """
    if not sys.platform.startswith("linux"):
        return time.monotonic() - _IMPORTED
    # The second field is the program's name in parentheses and may itself hold spaces; what follows has none.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # `starttime`, clock ticks since boot
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def peak_rss_bytes() -> int:
    """Returns the most resident memory this process has held so far, in bytes; 0 where the system can't tell."""
    if sys.platform.startswith("linux"):
        # Not `ru_maxrss`: that one is inherited from whichever process started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Returns the memory that this process may still take without swapping, in bytes; None where the system can't tell.

    That is what the kernel thinks is available, or what the limits of the process's control groups leave of it.

    Args:
      root: of the file system, for tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([available, *_left_by_control_groups(root)]))


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """Yields what each memory limit on this process leaves it, of control groups version 2 and 1."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = (
                root / "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit further up holds as well
            if folder == top or top in folder.parents:
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    yield _left_by(folder, *names)


def _left_by(folder: Path, limit: str, usage: str, cached: str) -> int:
    """Returns what a control group's limit leaves; cached files count as free, for the kernel drops them."""
    most, used = (int((folder / name).read_text()) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return most - used + int(stat.get(cached, 0))
