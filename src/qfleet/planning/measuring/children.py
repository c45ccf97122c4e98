"""Processes that measure parts: how they start, what they report, and how they end."""

import contextlib
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError, RunFailed
from qfleet.runtime.child_process import ChildProcess


class Children:
    """The processes that one measurement starts, and a folder for what they are told and what they print."""

    def __init__(self, folder: Path) -> None:
        """Has no processes yet."""
        self._folder = folder
        self._children: list[tuple[ChildProcess, Path]] = []

    def start(self, module: str, spec: Any, environment: Mapping[str, str]) -> "Measuring":
        """Starts a process, as `python -m MODULE FILE DESCRIPTOR`.

        Args:
          module: name of its module.
          spec: what the file holds, pickled.
          environment: all of its environment variables.
        """
        number = len(self._children)
        path, log = self._folder / f"{number}.pickle", self._folder / f"{number}.log"
        path.write_bytes(pickle.dumps(spec))
        child = ChildProcess()
        self._children.append((child, log))
        command = [sys.executable, "-P", "-m", module, str(path), str(child.report_descriptor)]
        child.start(command, dict(environment), log)
        return Measuring(child, log)

    def kill(self) -> None:
        """Kills all of them."""
        for child, _ in self._children:
            child.kill()

    def check_alive(self) -> None:
        """Raises RunFailed if one of them has ended."""
        for child, log in self._children:
            if child.poll() is not None:
                raise RunFailed(f"a part of the run could not be measured; the process printed:{_end_of(log)}")


class Measuring:
    """A process that measures."""

    def __init__(self, child: ChildProcess, log: Path) -> None:
        self._child, self._log = child, log
        self.pid = child.pid
        """Process id."""

    def report(self) -> Any:
        """Waits for what the process reports, and returns it.

        Raises:
          ConfigError: as the process raised it.
          RunFailed: if the process fails otherwise.
        """
        data = b""
        while piece := self._child.read():
            data += piece
        if not data:
            raise RunFailed(f"a part of the run could not be measured; the process printed:{_end_of(self._log)}")
        found = pickle.loads(data)
        if isinstance(found, ConfigError):
            raise found
        if isinstance(found, Exception):
            raise RunFailed(
                f"a part of the run could not be measured: {found}; the process printed:{_end_of(self._log)}"
            )
        return found


def _end_of(log: Path) -> str:
    """Returns the last lines of what a process has printed, on lines of their own."""
    return "\n" + "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])


@contextlib.contextmanager
def children() -> Iterator[Children]:
    """Yields processes that measure, none of which is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="qfleet-plan-") as folder:
        started = Children(Path(folder))
        try:
            yield started
        finally:
            started.kill()


def reports(started: Sequence[Measuring]) -> list[Any]:
    """Returns what each process reports."""
    return [each.report() for each in started]
