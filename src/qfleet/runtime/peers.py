"""What equal processes agree on while they run one program together; with one process there is nobody to ask.

All of them call each of these at the same place. What a clock says, or a signal, differs between processes, and one
that decided by its own would run another program than the rest, which would wait for it for ever.
"""

import ctypes
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from qfleet.config import ConfigError


def is_first() -> bool:
    """Returns whether this process is the one that writes what only one must."""
    import jax

    return jax.process_index() == 0


def gather(values: np.ndarray) -> np.ndarray:
    """Returns every process's `values`, `[processes, ...]`."""
    import jax

    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    replicated = np.asarray(multihost_utils.process_allgather(values))
    widen_send_buffers()
    return replicated


_SEND_BUFFER_BYTES = 2**22
"""Of a connection, if the system allows that; a connection with less than a 64th of it is taken for one of Gloo's."""


def widen_send_buffers() -> None:
    """Gives connections of this process that have next to no send buffer a usual one; Linux only.

    Gloo, by which processes on CPUs exchange what they learn, opens connections with the smallest buffer that there is.
    A message must then wait until the one before is acknowledged, for which TCP takes up to 40 ms if nothing is to be
    sent the other way. It opens them when a program first runs, so this is called now and then.
    """
    if not sys.platform.startswith("linux"):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        with connection:
            is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            is_tcp = is_internet and connection.type == socket.SOCK_STREAM
            size = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            if is_tcp and size < _SEND_BUFFER_BYTES // 64:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


def firsts(number: float) -> float:
    """Returns the first process's number."""
    return float(gather(np.float64(number).reshape(1))[0, 0])


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Returns of each flag whether it is set in any process."""
    replicated = gather(np.array(flags))
    return tuple(bool(replicated[:, i].any()) for i in range(len(flags)))


def check_agreed(settings: Mapping[str, int]) -> None:
    """Leaves the others and raises ConfigError, as all of them do, unless all have the same settings."""
    values = np.array(list(settings.values()), np.int64)
    replicated = gather(values.view(np.int32)).view(np.int64)  # JAX would cut them to 32 bits
    for name, each in zip(settings, replicated.T.tolist(), strict=True):
        if len(set(each)) > 1:
            leave()  # in order, or one that ends first would take the others along before they have said why
            raise ConfigError(
                f"all processes must have the same {name}, got {each} of processes 0 to {len(each) - 1}; start all "
                f"with the same flags but --process-id, in one folder that all of them see"
            )


# --- One of several processes: joining the others, and telling the launcher that it lives ---

BEAT_SECONDS = 0.5
"""Between two signs of life."""


class Reporter:
    """Tells a launcher, line by line of JSON, that this process lives and how far it has come."""

    def __init__(self, descriptor: int) -> None:
        """Begins to give signs of life at once, in a thread of its own; the process ends where nobody reads them.

        Args:
          descriptor: of the pipe to the launcher.
        """
        self._descriptor = descriptor
        self._lock = threading.Lock()
        _die_with_parent()
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, kind: str, **content: Any) -> None:
        """Sends a message: its kind and its content."""
        line = (json.dumps({"kind": kind, **content}) + "\n").encode()
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._descriptor, line) :]
        except OSError:  # the launcher is gone: nothing of this run may stay behind
            os._exit(1)

    def _beat(self) -> None:
        while True:
            self.tell("alive")
            time.sleep(BEAT_SECONDS)


def _die_with_parent() -> None:
    """Has Linux kill this process when the launcher dies, even if it is stopped. Elsewhere its next beat ends it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def join(coordinator: str, num_processes: int, index: int, num_devices: int, timeout_seconds: float) -> None:
    """Joins the processes of a run, to be called before JAX is used for anything else.

    Args:
      coordinator: HOST:PORT of the first process.
      num_processes: in total.
      index: of this one.
      num_devices: that this one brings; of a CPU, so many are made.
      timeout_seconds: after which a silent process counts as lost.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which asks for a checkpoint
    jax.distributed.initialize(
        coordinator,
        num_processes,
        index,
        initialization_timeout=max(60, round(2 * timeout_seconds)),
        heartbeat_timeout_seconds=max(5, round(timeout_seconds)),
        shutdown_timeout_seconds=max(5, round(timeout_seconds)),
    )


def leave() -> None:
    """Leaves the processes of a run, once all have come to their end."""
    import jax

    jax.distributed.shutdown()
