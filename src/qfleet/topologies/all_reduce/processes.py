"""What a group of processes is to the launcher, wherever it runs, and what is common to all groups."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from qfleet.runtime.run_files import open_to_append


class JoinInfo(NamedTuple):
    """What a process must know to join the others."""

    number: int
    """Number of the process, from 0."""
    coordinator: str
    """HOST:PORT of the first process, through which all find each other."""
    report_descriptor: int
    """File descriptor of the pipe that it reports to."""
    python: str
    """Python interpreter on its host."""


class ProcessLost(Exception):
    """A process died or fell silent; the message says which one, and how."""


class ProcessGroup(Protocol):
    """All processes that one launcher watches, from one start to their end. A process is known by its number."""

    def start(self, must_stop: Callable[[], bool]) -> None:
        """Starts all processes.

        Args:
          must_stop: returns whether to stop waiting for room to start them.

        Raises:
          ConfigError: if they can't be started as the config asks.
          ProcessLost: if they can't be started now, although an earlier group could.
          KeyboardInterrupt: if `must_stop` returned true.
        """

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        """Waits at most this long for a report, and yields every piece that is there, with the process's number."""

    def reports_have_ended(self) -> bool:
        """Returns whether everything that the processes will ever report has been read."""

    def exit_codes(self) -> dict[int, int | None]:
        """Returns the exit codes, as `subprocess` has them: None for one that runs, negative for a signal."""

    def name(self, number: int) -> str:
        """Returns in words which process it is."""

    def cause(self, number: int) -> str:
        """Returns in words how a process ended, to follow its name."""

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the processes that run."""

    def kill(self) -> None:
        """Kills the processes, and those that they started. May be called twice, and before `start`."""


class ChildProcess:
    """A process on this host, and the pipe through which it reports.

    The pipe is made first, because the command of the process names its descriptor.
    """

    def __init__(self) -> None:
        self._reading, self.report_descriptor = os.pipe()
        self._process: subprocess.Popen | None = None

    def start(self, command: list[str], environment: dict[str, str], log: Path, folder: str | None = None) -> None:
        """Starts the process.

        Args:
          command: program and arguments.
          environment: all of its environment variables.
          log: file to which its output is appended.
          folder: its working directory; None for that of this process.
        """
        with open_to_append(log) as output:
            # It leads a process group of its own, so that it and its children can be killed together, and so that only
            # the launcher receives Ctrl-C.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self.report_descriptor,),
                cwd=folder,
                env=environment,
                process_group=0,
            )
        os.close(self.report_descriptor)  # the child has the only copy then, so its end closes the pipe

    @property
    def pid(self) -> int:
        """Process id on this host."""
        assert self._process is not None
        return self._process.pid

    def fileno(self) -> int:
        """Returns the descriptor that a selector waits for: the reading end of the pipe."""
        return self._reading

    def read(self) -> bytes:
        """Waits for a piece of the report, and returns it; empty once the report has ended."""
        return os.read(self._reading, 1 << 16)

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        """Waits until the process has ended, at most this long."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def ask_to_stop(self) -> None:
        """Sends SIGTERM."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the process and all that it has started, and closes the pipe. Call it once, even without a start."""
        if self._process is None:
            os.close(self.report_descriptor)
        else:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended already
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._reading)


def cause_of(code: int | None) -> str:
    """Returns in words how a process with this exit code ended, to follow its name."""
    assert code is not None
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def free_port(host: str) -> int:
    """Returns a port at an address of this host that no process listens to."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def share_cores(environment: dict[str, str], num_here: int) -> None:
    """Sets how many threads one of several processes on this host uses: its share of the cores.

    With more threads than cores, the threads of different processes would compete for them.

    Args:
      environment: the process's environment variables; those that are set already stay.
      num_here: processes on this host.
    """
    share = str(max(1, (os.cpu_count() or 1) // num_here))
    for name in ("PJRT_NPROC", "OMP_NUM_THREADS"):
        environment.setdefault(name, share)
