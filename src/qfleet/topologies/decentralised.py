"""The decentralised topology: equal processes in step by all-reduce, and the launcher that watches over them.

What runs in each process is the fused or the overlapped topology, on a mesh over the devices of all of them. There is
no server: every process holds the parameters, and none depends on another but for the gradients' mean. The launcher
takes no part in learning. It starts the processes of this host, listens to them, and, where one dies or falls silent,
ends all and starts them again from the newest checkpoint: collectives that one partner has left never return.
"""

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qfleet.config import ConfigError, DecentralisedConfig, RunFailed
from qfleet.runtime.signals import StopFlag

logger = logging.getLogger("qfleet")

MOST_SILENT_PROGRESS = 10
"""Times `peer_timeout_seconds` without any progress, though every process lives, after which all start again."""

_POLL_SECONDS = 0.05

_GATHER_SECONDS = 0.3
"""After the first process has ended, for the others that it takes along: to tell cause from effect."""


class Peer(NamedTuple):
    """What one process must know to join the others."""

    number: int
    coordinator: str
    report_descriptor: int


class _PeerLost(Exception):
    """A process died or fell silent: which, and how."""


class Launcher:
    """Starts the processes of this host and sees them through to their end."""

    def __init__(
        self, config: DecentralisedConfig, make_command: Callable[[Peer], list[str]], log_folder: Path
    ) -> None:
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
        with StopFlag() as stop:
            while True:
                group = _Group(self._config, self._make_command, self._log_folder)
                try:
                    for message in group.messages(stop):
                        self._env_steps = message["env_steps"]
                        yield message
                    return
                except GeneratorExit:  # the caller has left the loop
                    group.stop()
                    raise
                except _PeerLost as lost:
                    if stop.requested:
                        raise RunFailed(
                            f"a run must be left in order, but {lost} while it stopped; resume from environment step "
                            f"{newest_checkpoint()} with `qfleet resume`"
                        ) from lost
                    self._restart_after(str(lost), newest_checkpoint())
                finally:
                    group.kill()

    def _restart_after(self, lost: str, checkpoint: int) -> None:
        repeated = max(0, self._env_steps - checkpoint)
        if self.num_restarts == self._config.max_restarts:
            raise RunFailed(
                f"a decentralised run may lose a process max_restarts={self._config.max_restarts} times, and {lost}; "
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
    """The processes of this host, from one start to their end."""

    def __init__(
        self, config: DecentralisedConfig, make_command: Callable[[Peer], list[str]], log_folder: Path
    ) -> None:
        self._config = config
        indices = range(config.num_processes) if config.process_id is None else [config.process_id]
        coordinator = config.coordinator or f"127.0.0.1:{_free_port()}"
        log_folder.mkdir(parents=True, exist_ok=True)
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, subprocess.Popen] = {}
        self._heard_at: dict[int, float] = {}
        self._pipes: list[BinaryIO] = []
        self._unread: dict[int, bytes] = {}
        for i in indices:
            reading, writing = os.pipe()
            command = make_command(Peer(i, coordinator, writing))
            with (log_folder / f"{i}.log").open("ab") as log:
                # A group of its own, so that it and its workers end together, and Ctrl-C comes to the launcher only.
                self._processes[i] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing,),
                    env=_environment(i, len(indices), config.devices_per_process),
                    process_group=0,
                )
            os.close(writing)
            _keep_to_its_cores(self._processes[i].pid, indices.index(i), len(indices))
            pipe = os.fdopen(reading, "rb", buffering=0)
            os.set_blocking(reading, False)
            self._pipes.append(pipe)
            self._selector.register(pipe, selectors.EVENT_READ, i)
            self._heard_at[i], self._unread[i] = time.monotonic(), b""

    def messages(self, stop: StopFlag) -> Iterator[dict[str, Any]]:
        """Yields messages of progress until all processes have ended well; passes a request to stop on to them."""
        progressed_at, asked_at = time.monotonic(), None
        while True:
            have_ended = all(process.poll() == 0 for process in self._processes.values())
            for message in self._read():
                if message["kind"] == "progress":
                    progressed_at = time.monotonic()
                    yield message
                _raise_if_failed(message)
            if stop.requested and asked_at is None:
                asked_at = time.monotonic()
                for process in self._processes.values():
                    process.send_signal(signal.SIGTERM)
            is_stopping = asked_at is not None
            if have_ended and not self._selector.get_map():
                return  # and all that they said is read
            self._check_ended(is_stopping)
            if is_stopping and all(process.poll() is not None for process in self._processes.values()):
                return  # one was asked to stop before it could listen
            self._check_silent(progressed_at)

    def _read(self) -> Iterator[dict[str, Any]]:
        for key, _ in self._selector.select(_POLL_SECONDS):
            i, data = key.data, key.fileobj.read(1 << 16)  # type: ignore[union-attr]
            if not data:  # it has ended, or will
                self._selector.unregister(key.fileobj)
                continue
            self._heard_at[i] = time.monotonic()
            *lines, self._unread[i] = (self._unread[i] + data).split(b"\n")
            yield from map(json.loads, lines)

    def _check_ended(self, is_stopping: bool) -> None:
        """Raises _PeerLost if a process has died."""
        if not any(self._died(process, is_stopping) for process in self._processes.values()):
            return
        time.sleep(_GATHER_SECONDS)
        for message in self._read():  # the last words of whatever has ended
            _raise_if_failed(message)
        codes = {i: process.returncode for i, process in self._processes.items() if self._died(process, is_stopping)}
        # What was killed is the cause; the others fail, or abort, for want of it.
        culprit = min(codes, key=lambda i: (codes[i] >= 0 or codes[i] == -signal.SIGABRT, i))
        code = codes[culprit]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise _PeerLost(f"process {culprit} of {self._config.num_processes} {how}")

    @staticmethod
    def _died(process: subprocess.Popen, is_stopping: bool) -> bool:
        code = process.poll()
        return code not in (None, 0) and not (is_stopping and code == -signal.SIGTERM)

    def _check_silent(self, progressed_at: float) -> None:
        """Raises _PeerLost if a process has said nothing for too long, or nothing goes on though all live."""
        now, patience = time.monotonic(), self._config.peer_timeout_seconds
        for i, process in self._processes.items():
            if process.poll() is None and now - self._heard_at[i] > patience:
                raise _PeerLost(f"process {i} of {self._config.num_processes} gave no sign of life for {patience:g} s")
        if 0 in self._processes and now - progressed_at > MOST_SILENT_PROGRESS * patience:
            raise _PeerLost(f"no process made progress for {MOST_SILENT_PROGRESS * patience:g} s")

    def stop(self) -> None:
        """Asks all processes to stop, and gives them time to leave a checkpoint."""
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._config.peer_timeout_seconds
        while any(process.poll() is None for process in self._processes.values()) and time.monotonic() < deadline:
            for _ in self._read():  # or they might wait for somebody to listen
                pass

    def kill(self) -> None:
        """Ends what is left of the processes and of theirs; may be called twice."""
        for process in self._processes.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # ended, with all that it started
        for process in self._processes.values():
            process.wait()
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()


def _raise_if_failed(message: dict[str, Any]) -> None:
    if message["kind"] == "failed":
        raise (ConfigError if message["is_config"] else RunFailed)(message["error"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _keep_to_its_cores(pid: int, place: int, num_here: int) -> None:
    """Gives one of so many processes on this host its share of the cores, where there are enough to share.

    In step, the slowest sets the pace, and one that the system moves between cores is slow: on two cores, two processes
    are a quarter faster if each keeps to its own.
    """
    if not hasattr(os, "sched_setaffinity"):  # Linux has it
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_here
    if share:
        os.sched_setaffinity(pid, cores[place * share : (place + 1) * share])


def _environment(index: int, num_here: int, num_devices: int) -> dict[str, str]:
    """Returns the environment variables of one of so many processes on this host: its share of cores and GPUs."""
    environment = dict(os.environ)
    share = str(max(1, (os.cpu_count() or 1) // num_here))
    for name in ("PJRT_NPROC", "OMP_NUM_THREADS"):  # more threads than cores would fight
        environment.setdefault(name, share)
    if num_here > 1:
        first = index * num_devices
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [str(i) for i in range(first + num_devices)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + num_devices])
    return environment
