"""Processes that this one starts on this host: how they report, share the cores and GPUs, and end."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import selectors
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qfleet.runtime.run_files import open_to_append


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

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the process still runs."""
        assert self._process is not None
        self._process.send_signal(number)

    def ask_to_stop(self) -> None:
        """Sends SIGTERM."""
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the process and all that it has started, and closes the pipe. Call it once, even without a start."""
        if self._process is None:
            os.close(self.report_descriptor)
        else:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended already
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._reading)


class ChildProcesses:
    """Child processes by number. `read` waits for what any of them reports."""

    def __init__(self) -> None:
        self._children: dict[int, ChildProcess] = {}
        self._selector = selectors.DefaultSelector()

    def add(self, number: int) -> ChildProcess:
        """Returns a new child under this number, to be started and then passed to `watch`."""
        child = self._children[number] = ChildProcess()
        return child

    def watch(self, number: int) -> None:
        """Makes `read` wait for this child too. Call it once the child has started."""
        self._selector.register(self._children[number], selectors.EVENT_READ, number)

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        """Waits at most this long for a report, and yields every piece that is there, with the child's number."""
        for key, _ in self._selector.select(seconds):
            number: int = key.data
            if data := self._children[number].read():
                yield number, data
            else:  # the process has ended, or is about to
                self._selector.unregister(key.fileobj)

    def reports_have_ended(self) -> bool:
        """Returns whether everything that the processes will ever report has been read."""
        return not self._selector.get_map()

    def exit_codes(self) -> dict[int, int | None]:
        """Returns the exit codes, as `subprocess` has them: None for one that runs, negative for a signal."""
        return {i: child.poll() for i, child in self._children.items()}

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the processes that run."""
        for child in self._children.values():
            child.ask_to_stop()

    def send(self, number: int, signal_number: signal.Signals) -> None:
        """Sends a signal to one process, if it still runs."""
        self._children[number].send(signal_number)

    def remove(self, number: int) -> None:
        """Kills a process, if it still runs, and forgets it."""
        child = self._children.pop(number)
        with contextlib.suppress(KeyError):  # its report has ended, or it was never started
            self._selector.unregister(child)
        child.kill()

    def kill(self) -> None:
        """Kills all processes, and those that they started. May be called twice."""
        while self._children:
            self.remove(next(iter(self._children)))
        self._selector.close()


class Messages:
    """Puts the pieces of reports together: lines of JSON."""

    def __init__(self) -> None:
        self._unread: dict[int, bytes] = {}
        """The beginning of each process's next message, without its end."""

    def add(self, number: int, data: bytes) -> Iterator[dict[str, Any]]:
        """Yields the messages of a process that are complete with this piece."""
        *lines, self._unread[number] = (self._unread.get(number, b"") + data).split(b"\n")
        yield from map(json.loads, lines)


def cause_of(code: int | None) -> str:
    """Returns in words how a process with this exit code ended, to follow its name; '' for one that runs."""
    if code is None:
        return ""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


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


def visible_gpus() -> list[str]:
    """Returns the GPUs that JAX would use here, as CUDA_VISIBLE_DEVICES names them; empty if it would use the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not _jax_has_cuda():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    names = [name.strip() for name in named.split(",")]
    # CUDA stops at the first name that is not valid, too.
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def _jax_has_cuda() -> bool:
    """Returns whether JAX is installed with support for NVIDIA GPUs. Asking JAX itself would occupy a GPU."""
    return any("cuda" in plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins"))
