"""Other processes, as tests see them: whether they live, what their command is, and what they do in time."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns once a condition holds. If it never does, the test's own time runs out."""
    while not holds():
        time.sleep(0.1)


def lives(pid: int) -> bool:
    """Returns whether a process exists and hasn't ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_of(pid: int) -> list[str]:
    """Returns the command line of a process, or nothing if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
