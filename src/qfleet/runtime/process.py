"""What the operating system knows of this process: its age and its memory."""

import os
import sys
import time
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
