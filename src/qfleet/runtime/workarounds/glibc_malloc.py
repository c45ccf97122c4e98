"""glibc returns large freed blocks to the system. Seen in glibc 2.36 with jaxlib 0.10.2.

XLA allocates the temporary arrays of a CPU program anew at each call. For convolutions these take some 60 MB. glibc
gives blocks of this size back to the system when they are freed. The next call then gets fresh pages, each of which the
kernel must clear: this took 9 of the 22 ms of a learner step of the Nature network, batch 32, on two cores. XLA has no
setting for it, so this module changes glibc's own, through `mallopt`.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # numbers of the settings, from glibc's malloc.h


def reuse_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation. Does nothing where the C library is another."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
