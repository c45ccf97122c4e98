"""The launcher of an all-reduce run: starts the processes, and starts all of them again after a loss.

It takes no part in learning. The package's docstring shows the data flow.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from qfleet.config import AllReduceConfig, ConfigError, RunFailed
from qfleet.runtime.signals import StopFlag
from qfleet.topologies.all_reduce.listener import Listener
from qfleet.topologies.all_reduce.local_processes import LocalProcessGroup, check_gpus
from qfleet.topologies.all_reduce.processes import JoinInfo, ProcessGroup, ProcessLost

logger = logging.getLogger("qfleet")


def check_places(config: AllReduceConfig) -> None:
    """Checks that there is room for the processes, as far as that is known before they start.

    How many GPUs a Ray cluster has is found out when the processes start.

    Raises:
      ConfigError: if the config wants a Ray cluster and Ray isn't installed, or if this host has too few GPUs.
    """
    if config.ray_address is not None:
        importlib.import_module("qfleet.topologies.fleet.cluster")  # raises ConfigError without Ray
    else:
        check_gpus(config)


class Launcher:
    """Starts the processes of a run, and watches them to their end."""

    def __init__(
        self, config: AllReduceConfig, make_command: Callable[[JoinInfo], list[str]], log_folder: Path
    ) -> None:
        """Starts nothing yet; `run` does.

        Args:
          config: how many processes there are, where they run, and how long they may be silent.
          make_command: returns the command of one process.
          log_folder: folder for the output of the processes, one file each; made if it does not exist.
        """
        self._config, self._make_command, self._log_folder = config, make_command, log_folder
        self.num_restarts = 0
        self.env_steps_repeated = 0
        """Environment steps that were taken again because of the restarts."""
        self._env_steps = 0
        """Environment steps of the newest message of progress."""

    def run(self, newest_checkpoint: Callable[[], int]) -> Generator[dict[str, Any], None, None]:
        """Yields the progress that the first process reports, until all processes have ended.

        Yields nothing if the first process belongs to the launcher of another host.

        Args:
          newest_checkpoint: returns the environment steps of the newest checkpoint, 0 if there is none.

        Raises:
          ConfigError, RunFailed: as a process raised it, or if more processes were lost than `max_restarts` allows.
        """
        try:
            self._log_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the output of the processes needs a folder, got {self._log_folder} ({error.strerror}); fix the "
                f"permissions, or move away what is there"
            ) from error
        with self._open_groups() as make_group, StopFlag() as stop:
            while True:
                group = make_group()
                listener = Listener(self._config, group)
                try:
                    for message in listener.messages(stop):
                        self._env_steps = message["env_steps"]
                        yield message
                    return
                except GeneratorExit:  # the caller has left its loop
                    listener.stop()
                    raise
                except ProcessLost as lost:
                    if stop.requested:
                        raise RunFailed(
                            f"a run that is asked to stop must write a checkpoint, but {lost} before it had; resume "
                            f"from environment step {newest_checkpoint()} with `qfleet resume`"
                        ) from lost
                    self._restart_after(lost, newest_checkpoint())
                finally:
                    group.kill()

    def _open_groups(self) -> contextlib.AbstractContextManager[Callable[[], ProcessGroup]]:
        """Returns a context with a function that makes a group of processes; after a loss it is called again."""
        if self._config.ray_address is None:
            return contextlib.nullcontext(lambda: LocalProcessGroup(self._config, self._make_command, self._log_folder))
        from qfleet.topologies.all_reduce.ray_processes import groups_on_ray  # here, because Ray is optional

        return groups_on_ray(self._config, self._make_command, self._log_folder)

    def _restart_after(self, lost: ProcessLost, checkpoint: int) -> None:
        """Counts a restart from a checkpoint, and says so.

        Raises:
          RunFailed: if there were `max_restarts` restarts already.
        """
        max_restarts = self._config.max_restarts
        if self.num_restarts == max_restarts:
            raise RunFailed(
                f"an all-reduce run may lose a process max_restarts={max_restarts} times, and {lost}; see "
                f"{self._log_folder}, then resume from environment step {checkpoint} with `qfleet resume`"
            )
        repeated = max(0, self._env_steps - checkpoint)
        self.num_restarts += 1
        self.env_steps_repeated += repeated
        logger.warning(
            "%s; all processes start again from environment step %d and repeat %d steps (restart %d of %d)",
            lost,
            checkpoint,
            repeated,
            self.num_restarts,
            max_restarts,
        )
