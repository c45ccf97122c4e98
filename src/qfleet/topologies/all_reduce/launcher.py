"""The launcher of an all-reduce run: it starts and kills the processes as `machine.LauncherMachine` decides.

It takes no part in learning. The package's docstring shows the data flow.
"""

import collections
import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from qfleet.config import AllReduceConfig, ConfigError
from qfleet.runtime.child_process import Messages
from qfleet.runtime.signals import StopFlag
from qfleet.topologies.all_reduce.local_processes import LocalProcessGroup, check_gpus
from qfleet.topologies.all_reduce.machine import AskToStop, End, GiveUp, LauncherMachine, PassOn, Request, StartGroup
from qfleet.topologies.all_reduce.processes import JoinInfo, ProcessGroup, ProcessLost
from qfleet.topologies.fleet.messages import Warn

logger = logging.getLogger("qfleet")

_POLL_SECONDS = 0.05
"""Longest wait for a report before the processes are looked at."""

_LONGEST_SECONDS = 1.0
"""Longest time that one wait counts for. If it takes longer, this process was stopped meanwhile."""


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
    """Starts the processes of a run, and carries out what `machine` decides about them."""

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
        self.machine = LauncherMachine(config, str(log_folder))

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
            group, reports = make_group(), Messages()
            try:
                requests = collections.deque(self._start(group, stop))
                while True:
                    while not requests:
                        requests += self._listen(group, reports, stop)
                    match requests.popleft():
                        case StartGroup():
                            group, reports = make_group(), Messages()
                            requests += self._start(group, stop)
                        case PassOn(message):
                            try:
                                yield message
                            except GeneratorExit:  # the caller has left its loop
                                requests = collections.deque(each for each in requests if isinstance(each, AskToStop))
                                requests += self.machine.left()
                        case AskToStop():
                            group.ask_to_stop()
                        case GiveUp():
                            group.kill()
                            requests += self.machine.checkpoint_found(newest_checkpoint())
                        case Warn(text):
                            logger.warning("%s", text)
                        case End(failure):
                            if failure is None:
                                return
                            raise failure
            finally:
                group.kill()

    def _open_groups(self) -> contextlib.AbstractContextManager[Callable[[], ProcessGroup]]:
        """Returns a context with a function that makes a group of processes; after a loss it is called again."""
        if self._config.ray_address is None:
            return contextlib.nullcontext(lambda: LocalProcessGroup(self._config, self._make_command, self._log_folder))
        from qfleet.topologies.all_reduce.ray_processes import groups_on_ray  # here, because Ray is optional

        return groups_on_ray(self._config, self._make_command, self._log_folder)

    def _start(self, group: ProcessGroup, stop: StopFlag) -> list[Request]:
        try:
            group.start(lambda: stop.requested)
        except ProcessLost as lost:
            return self.machine.lost(str(lost))
        return []

    def _listen(self, group: ProcessGroup, reports: Messages, stop: StopFlag) -> list[Request]:
        """Waits for a short time, and tells the machine what has happened to the processes by then."""
        requests = list[Request]()
        # The states come first: everything that a process reported before its end is read after that.
        states, began = group.states(), time.monotonic()
        for i, data in group.read(_POLL_SECONDS):
            for message in reports.add(i, data):
                requests += self.machine.reported(i, message)
        seconds, have_ended = min(time.monotonic() - began, _LONGEST_SECONDS), group.reports_have_ended()
        look = self.machine.looked(seconds, states, have_reports_ended=have_ended, must_stop=stop.requested)
        return requests + look
