"""A group of processes on this host, without Ray, and how its processes share the cores and GPUs."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qfleet.config import AllReduceConfig, ConfigError
from qfleet.runtime.child_process import ChildProcesses, cause_of, share_cores, visible_gpus
from qfleet.topologies.all_reduce.processes import JoinInfo, ProcessState, free_port


class LocalProcessGroup(ChildProcesses):
    """The processes of this host: all processes of a run, or the one that `process_id` names."""

    def __init__(
        self, config: AllReduceConfig, make_command: Callable[[JoinInfo], list[str]], log_folder: Path
    ) -> None:
        """Starts nothing yet. The arguments are those of `Launcher`."""
        super().__init__()
        self._config, self._make_command, self._log_folder = config, make_command, log_folder

    def start(self, must_stop: Callable[[], bool]) -> None:
        numbers = _numbers_here(self._config)
        coordinator = self._config.coordinator or f"127.0.0.1:{free_port('127.0.0.1')}"
        for place, i in enumerate(numbers):
            child = self.add(i)
            child.start(
                self._make_command(JoinInfo(i, coordinator, child.report_descriptor, sys.executable)),
                environment_of(place, len(numbers), self._config.devices_per_process),
                self._log_folder / f"{i}.log",
            )
            keep_to_its_cores(child.pid, place, len(numbers))
            self.watch(i)

    def states(self) -> dict[int, ProcessState]:
        of_all = f"of {self._config.num_processes}"
        return {i: ProcessState(f"process {i} {of_all}", code, cause_of(code)) for i, code in self.exit_codes().items()}


def keep_to_its_cores(pid: int, place: int, num_here: int) -> None:
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
    num_gpus, num_here = len(visible_gpus()), len(_numbers_here(config))
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


def environment_of(place: int, num_here: int, num_devices: int) -> dict[str, str]:
    """Returns the environment variables of a process on this host, with its share of the cores and GPUs.

    Args:
      place: position of the process among those on this host, from 0.
      num_here: processes on this host.
      num_devices: GPUs of each process.
    """
    environment = dict(os.environ)
    share_cores(environment, num_here)
    if gpus := visible_gpus():
        # A process that is alone on its host must not see more GPUs than its share either: the mesh is made of the
        # first devices in the list of all processes' devices.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * num_devices : (place + 1) * num_devices])
    return environment
