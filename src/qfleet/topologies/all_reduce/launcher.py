"""The decentralised topology: equal processes in step by all-reduce, and the launcher that watches over them.

What runs in each process is the fused or the overlapped topology, on a mesh over the devices of all of them. There is
no server: every process holds the parameters, and none depends on another but for the gradients' mean. The launcher
takes no part in learning. It starts the processes, on this host or on a Ray cluster, listens to them, and, where one
dies or falls silent, ends all and starts them again from the newest checkpoint: collectives that one partner has left
never return.
"""

import contextlib
import importlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.runtime.signals import StopFlag
from qfleet.topologies.all_reduce.processes import LocalProcesses, Peer, PeerLost, Processes, check_gpus

logger = logging.getLogger("qfleet")

MOST_SILENT_PROGRESS = 10
"""Times `silence_seconds` without any progress, though every process lives, after which all start again."""

_POLL_SECONDS = 0.05

_GATHER_SECONDS = 0.3
"""After the first process has ended, for the others that it takes along: to tell cause from effect."""


def check_places(config: AllReduceConfig) -> None:
    """Raises ConfigError if Ray is to place the processes and isn't installed, or this host has too few GPUs for them.

    How many a Ray cluster has is found when it is asked for them.
    """
    if config.ray_address is not None:
        importlib.import_module("qfleet.topologies.fleet.cluster")
    else:
        check_gpus(config)


class Launcher:
    """Starts the processes and sees them through to their end."""

    def __init__(self, config: AllReduceConfig, make_command: Callable[[Peer], list[str]], log_folder: Path) -> None:
        """Starts nothing yet.

        Args:
          config: how many processes, and how patient to be.
          make_command: what runs one process.
          log_folder: for what they print, a file each; made if absent.
        """
        self._config, self._make_command, self._log_folder = config, make_command, log_folder
        self.num_restarts = 0
        self.env_steps_repeated = 0
        """Taken again because of them."""
        self._env_steps = 0  # of the newest progress

    def run(self, newest_checkpoint: Callable[[], int]) -> Iterator[dict[str, Any]]:
        """Yields what the first process tells of its progress, until all have ended.

        Without the first process here, as another host's launcher, yields nothing.

        Args:
          newest_checkpoint: its environment steps, 0 if there is none.

        Raises:
          ConfigError, RunFailed: as a process raised it, or if more were lost than `max_restarts` allows.
        """
        self._log_folder.mkdir(parents=True, exist_ok=True)
        with self._open_places() as make_processes, StopFlag() as stop:
            while True:
                processes = make_processes()
                group = _Group(self._config, processes)
                try:
                    for message in group.messages(stop):
                        self._env_steps = message["env_steps"]
                        yield message
                    return
                except GeneratorExit:  # the caller has left the loop
                    group.stop()
                    raise
                except PeerLost as lost:
                    if stop.requested:
                        raise RunFailed(
                            f"a run must be left in order, but {lost} while it stopped; resume from environment step "
                            f"{newest_checkpoint()} with `qfleet resume`"
                        ) from lost
                    self._restart_after(str(lost), newest_checkpoint())
                finally:
                    processes.kill()

    def _open_places(self) -> contextlib.AbstractContextManager[Callable[[], Processes]]:
        """Returns a context in which processes can be made, again and again."""
        if self._config.ray_address is None:
            return contextlib.nullcontext(lambda: LocalProcesses(self._config, self._make_command, self._log_folder))
        from qfleet.topologies.all_reduce.ray_processes import on_ray  # here, not above: Ray is an extra

        return on_ray(self._config, self._make_command, self._log_folder)

    def _restart_after(self, lost: str, checkpoint: int) -> None:
        repeated = max(0, self._env_steps - checkpoint)
        if self.num_restarts == self._config.max_restarts:
            raise RunFailed(
                f"an all-reduce run may lose a process max_restarts={self._config.max_restarts} times, and {lost}; "
                f"see {self._log_folder}, then resume from environment step {checkpoint} with `qfleet resume`"
            )
        self.num_restarts += 1
        self.env_steps_repeated += repeated
        logger.warning(
            "%s; all processes start again from environment step %d, %d steps are repeated (restart %d of %d)",
            lost,
            checkpoint,
            repeated,
            self.num_restarts,
            self._config.max_restarts,
        )


class _Group:
    """The processes of one launcher, from one start to their end."""

    def __init__(self, config: AllReduceConfig, processes: Processes) -> None:
        self._config, self._processes = config, processes
        self._heard_at: dict[int, float] = {}
        self._unread: dict[int, bytes] = {}

    def messages(self, stop: StopFlag) -> Iterator[dict[str, Any]]:
        """Starts all and yields messages of progress until they have ended well; passes a request to stop on."""
        self._processes.start(lambda: stop.requested)
        progressed_at, asked_at = time.monotonic(), None
        self._heard_at = dict.fromkeys(self._processes.codes(), progressed_at)
        while True:
            have_ended = all(code == 0 for code in self._processes.codes().values())
            for message in self._read():
                if message["kind"] == "progress":
                    progressed_at = time.monotonic()
                    yield message
                _raise_if_failed(message)
            if stop.requested and asked_at is None:
                asked_at = time.monotonic()
                self._processes.ask_to_stop()
            is_stopping = asked_at is not None
            if have_ended and self._processes.are_heard_out():
                return  # and all that they said is read
            self._check_ended(is_stopping)
            if is_stopping and None not in self._processes.codes().values():
                return  # one was asked to stop before it could listen
            self._check_silent(progressed_at)

    def _read(self) -> Iterator[dict[str, Any]]:
        for i, data in self._processes.read(_POLL_SECONDS):
            self._heard_at[i] = time.monotonic()
            *lines, self._unread[i] = (self._unread.get(i, b"") + data).split(b"\n")
            yield from map(json.loads, lines)

    def _check_ended(self, is_stopping: bool) -> None:
        """Raises PeerLost if a process has died."""
        if not self._died(is_stopping):
            return
        time.sleep(_GATHER_SECONDS)
        for message in self._read():  # the last words of whatever has ended
            _raise_if_failed(message)
        codes = self._died(is_stopping)
        # What was killed is the cause; the others fail, or abort, for want of it.
        culprit = min(codes, key=lambda i: (codes[i] >= 0 or codes[i] == -signal.SIGABRT, i))
        raise PeerLost(f"{self._processes.name(culprit)} {self._processes.fate(culprit)}")

    def _died(self, is_stopping: bool) -> dict[int, int]:
        """Returns the exit codes of those that should live."""
        in_order = (None, 0, -signal.SIGTERM) if is_stopping else (None, 0)
        return {i: code for i, code in self._processes.codes().items() if code is not None and code not in in_order}

    def _check_silent(self, progressed_at: float) -> None:
        """Raises PeerLost if a process has said nothing for too long, or nothing goes on though all live."""
        now, patience, codes = time.monotonic(), self._config.silence_seconds, self._processes.codes()
        for i, code in codes.items():
            if code is None and now - self._heard_at[i] > patience:
                raise PeerLost(f"{self._processes.name(i)} gave no sign of life for {patience:g} s")
        if 0 in codes and now - progressed_at > MOST_SILENT_PROGRESS * patience:
            raise PeerLost(f"no process made progress for {MOST_SILENT_PROGRESS * patience:g} s")

    def stop(self) -> None:
        """Asks all processes to stop, and gives them time to leave a checkpoint."""
        self._processes.ask_to_stop()
        deadline = time.monotonic() + self._config.silence_seconds
        while None in self._processes.codes().values() and time.monotonic() < deadline:
            for _ in self._read():  # or they might wait for somebody to listen
                pass


def _raise_if_failed(message: dict[str, Any]) -> None:
    if message["kind"] == "failed":
        raise (ConfigError if message["is_config"] else RunFailed)(message["error"])
