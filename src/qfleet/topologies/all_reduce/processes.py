"""The processes of an all-reduce run, as its launcher sees them wherever they run, and those of this host."""

import contextlib
import importlib.metadata
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from qfleet.config import AllReduceConfig, ConfigError


class Peer(NamedTuple):
    """What one process must know to join the others."""

    number: int
    coordinator: str
    report_descriptor: int
    python: str
    """The interpreter where it runs."""


class PeerLost(Exception):
    """A process died or fell silent: which, and how."""


class Processes(Protocol):
    """The processes that one launcher watches, by number, from one start to their end."""

    def start(self, must_stop: Callable[[], bool]) -> None:
        """Starts all of them.

        Args:
          must_stop: whether to give up waiting for a place, by KeyboardInterrupt.

        Raises:
          ConfigError: if they can't be started as they were asked for.
          PeerLost: if they could have been, before.
        """

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        """Yields what they report, as it comes; waits so long for the first of it."""

    def are_heard_out(self) -> bool:
        """Returns whether all that they will ever report has been read."""

    def codes(self) -> dict[int, int | None]:
        """Returns their exit codes, as `subprocess` has them: None of one that runs, negative for a signal."""

    def name(self, number: int) -> str:
        """Returns which process it is, in words."""

    def fate(self, number: int) -> str:
        """Returns how a process has ended, in words that follow its name."""

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to those that run."""

    def kill(self) -> None:
        """Ends what is left of the processes and of theirs; may be called twice, and without a start."""


class Child:
    """A process on this host and the pipe through which it reports, which is there first: its command names it."""

    def __init__(self) -> None:
        self._reading, self.report_descriptor = os.pipe()
        self._process: subprocess.Popen | None = None

    def start(self, command: list[str], environment: dict[str, str], log: Path, folder: str | None = None) -> None:
        """Starts it.

        Args:
          command: program and arguments.
          environment: all of its variables.
          log: file that what it prints is added to.
          folder: where it works; by default here.
        """
        with log.open("ab") as output:
            # A group of its own, so that it and its workers end together, and Ctrl-C comes to the launcher only.
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
        os.close(self.report_descriptor)  # the process has the other copy, so that its end ends the report

    @property
    def pid(self) -> int:
        """Its number on this host."""
        assert self._process is not None
        return self._process.pid

    def fileno(self) -> int:
        """Returns what a selector waits for."""
        return self._reading

    def read(self) -> bytes:
        """Returns some of what it has reported, waiting for it if there is none; nothing at the report's end."""
        return os.read(self._reading, 1 << 16)

    def poll(self) -> int | None:
        """Returns its exit code, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        """Waits so long for its end, at most."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def ask_to_stop(self) -> None:
        """Sends it SIGTERM."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and all that it has started, if it ever was; once."""
        if self._process is None:
            os.close(self.report_descriptor)
        else:
            with contextlib.suppress(ProcessLookupError):  # ended, with all that it started
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._reading)


class LocalProcesses:
    """Processes on this host: all of a run, or the one that was asked for."""

    def __init__(self, config: AllReduceConfig, make_command: Callable[[Peer], list[str]], log_folder: Path) -> None:
        """Starts nothing yet; the arguments are the launcher's."""
        self._config, self._make_command, self._log_folder = config, make_command, log_folder
        self._children: dict[int, Child] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, must_stop: Callable[[], bool]) -> None:
        numbers = _numbers_here(self._config)
        coordinator = self._config.coordinator or f"127.0.0.1:{free_port('127.0.0.1')}"
        for i in numbers:
            child = self._children[i] = Child()
            child.start(
                self._make_command(Peer(i, coordinator, child.report_descriptor, sys.executable)),
                _environment(numbers.index(i), len(numbers), self._config.devices_per_process),
                self._log_folder / f"{i}.log",
            )
            _keep_to_its_cores(child.pid, numbers.index(i), len(numbers))
            self._selector.register(child, selectors.EVENT_READ, i)

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        for key, _ in self._selector.select(seconds):
            i: int = key.data
            if data := self._children[i].read():
                yield i, data
            else:  # it has ended, or will
                self._selector.unregister(key.fileobj)

    def are_heard_out(self) -> bool:
        return not self._selector.get_map()

    def codes(self) -> dict[int, int | None]:
        return {i: child.poll() for i, child in self._children.items()}

    def name(self, number: int) -> str:
        return f"process {number} of {self._config.num_processes}"

    def fate(self, number: int) -> str:
        return fate_of(self._children[number].poll())

    def ask_to_stop(self) -> None:
        for child in self._children.values():
            child.ask_to_stop()

    def kill(self) -> None:
        self._selector.close()
        while self._children:
            self._children.popitem()[1].kill()


def fate_of(code: int | None) -> str:
    """Returns in words how a process with this exit code has ended."""
    assert code is not None
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def free_port(host: str) -> int:
    """Returns a port that nobody listens to, at an address of this host."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def share_cores(environment: dict[str, str], num_here: int) -> None:
    """Gives one of so many processes on this host its share of the cores: more threads than cores would fight."""
    share = str(max(1, (os.cpu_count() or 1) // num_here))
    for name in ("PJRT_NPROC", "OMP_NUM_THREADS"):
        environment.setdefault(name, share)


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


def check_gpus(config: AllReduceConfig) -> None:
    """Raises ConfigError if this host has GPUs, but too few for the processes that are to be started on it."""
    num_gpus, num_here = len(_visible_gpus()), len(_numbers_here(config))
    wanted = num_here * config.devices_per_process
    if 0 < num_gpus < wanted:
        raise ConfigError(
            f"each process must have devices_per_process={config.devices_per_process} GPUs of its own, got {num_gpus} "
            f"visible here for {num_here} process{'es' if num_here > 1 else ''}, which want {wanted}; give a smaller "
            f"--num-processes or --devices-per-process, name more GPUs in CUDA_VISIBLE_DEVICES, or set "
            f"JAX_PLATFORMS=cpu to use none"
        )


def _numbers_here(config: AllReduceConfig) -> Sequence[int]:
    """Returns which processes are to be started on this host, where Ray doesn't place them."""
    return range(config.num_processes) if config.process_id is None else [config.process_id]


def _environment(place: int, num_here: int, num_devices: int) -> dict[str, str]:
    """Returns the environment variables of one of so many processes on this host: its share of cores and GPUs."""
    environment = dict(os.environ)
    share_cores(environment, num_here)
    if gpus := _visible_gpus():
        # One that is alone takes no more than its share either: the mesh is made of the first devices of all.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * num_devices : (place + 1) * num_devices])
    return environment


def _visible_gpus() -> list[str]:
    """Returns the GPUs that JAX would take here, as CUDA_VISIBLE_DEVICES names them; none where it takes the CPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not _jax_has_cuda():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    names = [name.strip() for name in named.split(",")]
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it


def _jax_has_cuda() -> bool:
    """Returns whether JAX is installed with support of NVIDIA GPUs; asking JAX itself would take one."""
    return any("cuda" in plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins"))
