"""Runs the checks, each in a process of its own and for a limited time."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from qfleet.doctor.all_checks import CHECKS
from qfleet.doctor.check import Check
from qfleet.runtime.run_files import shortened

LIMIT_SECONDS = 30.0
"""Time that a check has. On two idle cores all of them take two seconds. Importing from a network disk takes longer."""

_VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a run under way on the GPU keeps its memory


def examine(names: Sequence[str] = tuple(CHECKS), limit_seconds: float = LIMIT_SECONDS) -> list[Check]:
    """Returns what the checks say, in order. A check that crashes or takes too long is bad.

    Args:
      names: names of checks.
      limit_seconds: time after which the processes of checks are killed.
    """
    running: list[subprocess.Popen[bytes]] = []
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        try:
            return list(pool.map(lambda name: _examined(name, limit_seconds, running), names))
        except BaseException:  # such as Ctrl-C, which doesn't reach processes in groups of their own
            for process in running:
                _kill(process)
            raise


def _examined(name: str, limit_seconds: float, running: list[subprocess.Popen[bytes]]) -> Check:
    try:
        process = subprocess.Popen(
            _command(name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | _VARIABLES,
            process_group=0,
        )
    except OSError as error:
        return Check(name, "bad", f"no process can be started ({error.strerror})", "end other programs")
    running.append(process)
    try:
        answer, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a disk can't be killed
            process.communicate(timeout=1.0)
        return Check(name, "bad", f"gave no answer within {limit_seconds:g} s", _by_hand(name))
    with contextlib.suppress(ValueError, TypeError):  # it has not come so far as to answer
        return Check(**json.loads(answer))
    lines = errors.decode(errors="replace").strip().splitlines()
    code = process.returncode
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Check(name, "bad", f"{end}: {shortened(lines[-1], 300) if lines else 'no output'}", _by_hand(name))


def _command(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", "qfleet.doctor", name]


def _by_hand(name: str) -> str:
    return f"see what it does: {shlex.join(_command(name))}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
