"""The processes that train one seed each of a run: their start, what they report, and their end."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qfleet.config import TrainConfig
from qfleet.config.encoding import encode_topology
from qfleet.runtime.child_process import ChildProcesses, Messages, cause_of
from qfleet.training.seed_places import SeedPlaces

LISTEN_SECONDS = 0.1
"""Longest wait for a report before the processes are checked."""


class SeedProcesses:
    """Processes by the index of their seed, at most one in each place. Each is an ordinary run of its seed's folder."""

    def __init__(self, config: TrainConfig, places: SeedPlaces) -> None:
        """Starts nothing yet.

        Args:
          config: of the run with all seeds. It says how far each is trained, and where.
          places: where the processes run.
        """
        self._config, self._places = config, places
        self._free = list(reversed(range(places.num_at_once)))
        self._taken: dict[int, int] = {}  # place by index
        self._children, self._reports = ChildProcesses(), Messages()
        self._ended: dict[int, int] = {}  # exit code by index

    @property
    def num_running(self) -> int:
        """Number of processes that were started and whose end `take_ended` hasn't told yet."""
        return len(self._taken)

    @property
    def has_room(self) -> bool:
        """Whether another process may start."""
        return bool(self._free)

    def start(self, index: int, folder: Path, log: Path) -> None:
        """Starts the process of a seed, which goes on in the seed's folder, in a free place.

        Args:
          index: index of the seed.
          folder: folder of the seed's run, which exists.
          log: file to which the process's output is appended.
        """
        place = self._taken[index] = self._free.pop()
        child = self._children.add(index)
        command = command_of(self._config, folder, child.report_descriptor)
        child.start(command, self._places.environments[place], log)
        self._children.watch(index)

    def messages(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Waits for a moment, and yields the messages that are complete by then, with the index of their seed.

        A process whose end `take_ended` tells afterwards has no message left.
        """
        # A pipe holds less than one piece, so what an ended process has written is read at once.
        self._ended = {i: code for i, code in self._children.exit_codes().items() if code is not None}
        for index, data in self._children.read(0 if self._ended else LISTEN_SECONDS):
            for message in self._reports.add(index, data):
                yield index, message

    def take_ended(self) -> dict[int, int]:
        """Returns the exit codes of the processes that have ended, by index, and frees their places."""
        for index in self._ended:
            self._children.remove(index)
            self._free.append(self._taken.pop(index))
        ended, self._ended = self._ended, {}
        return ended

    def ask_to_stop(self) -> None:
        """Asks all processes to stop as soon as they have saved."""
        self._children.ask_to_stop()

    def ask_to_save(self, indices: Iterable[int]) -> None:
        """Asks the processes of these seeds for a checkpoint. They must have reported, or the signal would end them."""
        for index in indices:
            self._children.send(index, signal.SIGUSR1)

    def wait(self) -> None:
        """Waits until all processes have ended."""
        while self.num_running:
            for _ in self.messages():  # a process whose pipe is full would wait until it is read
                pass
            self.take_ended()

    def kill(self) -> None:
        """Kills all processes. May be called twice."""
        self._children.kill()
        self._taken.clear()


def command_of(config: TrainConfig, folder: Path, report_descriptor: int) -> list[str]:
    """Returns the command of a process that goes on in the folder of a seed's run, as the whole run's config says."""
    settings = {
        "env_steps": config.env_steps,
        "stop_return": config.stop_return,
        "topology": encode_topology(config.topology),
    }
    flags = [f"--report-descriptor={report_descriptor}", f"--settings={json.dumps(settings)}"]
    return [sys.executable, "-P", "-m", "qfleet.cli.seed", str(folder.absolute()), *flags]


def cause_of_end(code: int, log: Path) -> str:
    """Returns in words how a process ended that has not said why, with the last line of its output."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"its process {cause_of(code)}" + (f" after it wrote {last[:300]!r}" if last and code > 0 else "")
