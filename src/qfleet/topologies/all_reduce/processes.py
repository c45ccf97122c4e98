"""What a group of processes is to the launcher, wherever it runs, and what is common to all groups."""

import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol


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


class ProcessState(NamedTuple):
    """What is known about a process."""

    name: str
    """Which process it is, in words."""
    code: int | None
    """Exit code, as `subprocess` has it: None for one that runs, negative for a signal."""
    cause: str
    """How it ended, in words, to follow its name; '' for one that runs."""


class ProcessLost(Exception):
    """A group can't be started because a process or its node is lost; the message says how."""


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

    def states(self) -> dict[int, ProcessState]:
        """Returns what is known about each process. Call it after `start`."""

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the processes that run."""

    def kill(self) -> None:
        """Kills the processes, and those that they started. May be called twice, and before `start`."""


def free_port(host: str) -> int:
    """Returns a port at an address of this host that no process listens to."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
