"""A group of processes on this host, without Ray, and how its processes share the cores and GPUs."""

import importlib.metadata
import itertools
import os
import selectors
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qfleet.config import AllReduceConfig, ConfigError
from qfleet.topologies.all_reduce.processes import ChildProcess, JoinInfo, cause_of, free_port, share_cores


class LocalProcessGroup:
    """The processes of this host: all processes of a run, or the one that `process_id` names."""

    def __init__(
        self, config: AllReduceConfig, make_command: Callable[[JoinInfo], list[str]], log_folder: Path
    ) -> None:
        """Starts nothing yet. The arguments are those of `Launcher`."""
        self._config, self._make_command, self._log_folder = config, make_command, log_folder
        self._children: dict[int, ChildProcess] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, must_stop: Callable[[], bool]) -> None:
        numbers = _numbers_here(self._config)
        coordinator = self._config.coordinator or f"127.0.0.1:{free_port('127.0.0.1')}"
        for place, i in enumerate(numbers):
            child = self._children[i] = ChildProcess()
            child.start(
                self._make_command(JoinInfo(i, coordinator, child.report_descriptor, sys.executable)),
                _environment(place, len(numbers), self._config.devices_per_process),
                self._log_folder / f"{i}.log",
            )
            _keep_to_its_cores(child.pid, place, len(numbers))
            self._selector.register(child, selectors.EVENT_READ, i)

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        for key, _ in self._selector.select(seconds):
            i: int = key.data
            if data := self._children[i].read():
                yield i, data
            else:  # the process has ended, or is about to
                self._selector.unregister(key.fileobj)

    def reports_have_ended(self) -> bool:
        return not self._selector.get_map()

    def exit_codes(self) -> dict[int, int | None]:
        return {i: child.poll() for i, child in self._children.items()}

    def name(self, number: int) -> str:
        return f"process {number} of {self._config.num_processes}"

    def cause(self, number: int) -> str:
        return cause_of(self._children[number].poll())

    def ask_to_stop(self) -> None:
        for child in self._children.values():
            child.ask_to_stop()

    def kill(self) -> None:
        self._selector.close()
        while self._children:
            self._children.popitem()[1].kill()


def _keep_to_its_cores(pid: int, place: int, num_here: int) -> None:
    """Binds a process to its share of this host's cores, if there is at least one core for each process.

    The slowest process sets the pace of all, and a process is slow if the system moves it between cores. On two cores,
    two processes are a quarter faster if each keeps to its own.

    Args:
      pid: id of the process.
      place: position of the process among those on this host, from 0.
      num_here: processes on this host.
    """
    if not hasattr(os, "sched_setaffinity"):  # only Linux has it
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_here
    if share:
        os.sched_setaffinity(pid, cores[place * share : (place + 1) * share])


def check_gpus(config: AllReduceConfig) -> None:
    """Raises ConfigError if this host has GPUs, but not enough for the processes to start on it."""
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
    """Returns the numbers of the processes to start on this host. Ray does not place them."""
    return range(config.num_processes) if config.process_id is None else [config.process_id]


def _environment(place: int, num_here: int, num_devices: int) -> dict[str, str]:
    """Returns the environment variables of a process on this host, with its share of the cores and GPUs.

    Args:
      place: position of the process among those on this host, from 0.
      num_here: processes on this host.
      num_devices: GPUs of each process.
    """
    environment = dict(os.environ)
    share_cores(environment, num_here)
    if gpus := _visible_gpus():
        # A process that is alone on its host must not see more GPUs than its share either: the mesh is made of the
        # first devices in the list of all processes' devices.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * num_devices : (place + 1) * num_devices])
    return environment


def _visible_gpus() -> list[str]:
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
