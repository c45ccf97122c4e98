"""Agreement between equal processes that run one program together. A single process agrees with itself.

Clocks and signals differ between processes. If a process acted on its own clock or signal, it would run another program
than the rest, and they would wait for it for ever. So all processes decide such things together: each of them calls
these functions at the same places.
"""

import ctypes
import ipaddress
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from qfleet.config import ConfigError
from qfleet.runtime.workarounds.gloo_address import listen_on
from qfleet.runtime.workarounds.gloo_send_buffers import widen_send_buffers
from qfleet.runtime.workarounds.gloo_thread import keep_from_interrupting


def is_first() -> bool:
    """Returns whether this is the process that writes the files of the run. Only one may."""
    import jax

    return jax.process_index() == 0


def gather(values: np.ndarray) -> np.ndarray:
    """Returns the `values` of every process, `[processes, ...]`."""
    import jax

    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    replicated = np.asarray(multihost_utils.process_allgather(values))
    widen_send_buffers()
    return replicated


def firsts(number: float) -> float:
    """Returns the number that the first process passes."""
    return float(gather(np.float64(number).reshape(1))[0, 0])


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Returns, for each flag, whether it is set in any process."""
    replicated = gather(np.array(flags))
    return tuple(bool(replicated[:, i].any()) for i in range(len(flags)))


def check_agreed(settings: Mapping[str, int]) -> None:
    """Raises ConfigError, in every process, unless all processes have the same settings."""
    values = np.array(list(settings.values()), np.int64)
    replicated = gather(values.view(np.int32)).view(np.int64)  # in halves, because JAX would cut them to 32 bits
    for name, each in zip(settings, replicated.T.tolist(), strict=True):
        if len(set(each)) > 1:
            # JAX ends a process whose peer disappears. All leave together, so that each lives to raise this error.
            leave()
            raise ConfigError(
                f"all processes must have the same {name}, got {each} from processes 0 to {len(each) - 1}; start all "
                f"with the same flags except --process-id, in one folder that all of them see"
            )


# --- For one of several processes: joining the others, and reporting to the launcher ---

BEAT_SECONDS = 0.5
"""Time between two signs of life."""


class Reporter:
    """Tells a launcher that this process lives and how far it has come. Each message is one line of JSON."""

    def __init__(self, descriptor: int, *, saves_at_end: bool = False) -> None:
        """Starts a thread that gives signs of life from now on. The process ends once nobody reads them.

        Args:
          descriptor: file descriptor of the pipe to the launcher.
          saves_at_end: whether the process, once the launcher is gone, is asked to stop as by SIGTERM, so that it saves
            what it has learned. Otherwise it ends at once, because one of several equal processes can't save alone.
        """
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._saves_at_end, self._is_alone = saves_at_end, False
        if not saves_at_end:
            _die_with_parent()
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, kind: str, **content: Any) -> None:
        """Sends a message of a kind, with its content as keywords."""
        line = (json.dumps({"kind": kind, **content}) + "\n").encode()
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._descriptor, line) :]
        except OSError:  # the launcher is gone, and no process of the run may outlive it
            self._end()

    def _end(self) -> None:
        if not self._saves_at_end:
            os._exit(1)
        with self._lock:
            is_first, self._is_alone = not self._is_alone, True
        if is_first:  # a second signal would end the process before it has saved
            os.kill(os.getpid(), signal.SIGTERM)

    def _beat(self) -> None:
        while not self._is_alone:
            self.tell("alive")
            time.sleep(BEAT_SECONDS)


def _die_with_parent() -> None:
    """Makes Linux kill this process when the launcher dies, even while it is stopped.

    On other systems the process ends when it fails to send its next sign of life.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def join(coordinator: str, num_processes: int, index: int, num_devices: int, timeout_seconds: float) -> None:
    """Joins the processes of a run. Call this before JAX is used for anything else.

    If the coordinator's address is one that only this machine can reach, all processes listen on nothing else.

    Args:
      coordinator: HOST:PORT of the first process.
      num_processes: number of processes in total.
      index: index of this process.
      num_devices: number of devices that this process has. On a CPU, JAX makes this many.
      timeout_seconds: time of silence after which a process counts as lost.
    """
    import jax

    if is_local := _is_loopback(coordinator):
        listen_on(coordinator.rpartition(":")[0].strip("[]"))
    keep_from_interrupting()
    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, which asks for a checkpoint
    jax.distributed.initialize(
        coordinator,
        num_processes,
        index,
        initialization_timeout=max(60, round(2 * timeout_seconds)),
        heartbeat_timeout_seconds=max(5, round(timeout_seconds)),
        shutdown_timeout_seconds=max(5, round(timeout_seconds)),
        coordinator_bind_address=coordinator if is_local else None,  # by default on all interfaces
    )


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def leave() -> None:
    """Leaves the run. Returns once all of its processes have called it."""
    import jax

    jax.distributed.shutdown()
