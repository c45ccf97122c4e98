"""What a run was started with, beside its config: versions, devices, hardware, command."""

import functools
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qfleet.config.lane_options import num_cores
from qfleet.runtime.process import total_memory_bytes
from qfleet.runtime.run_directory import RunDirectory, write_atomically
from qfleet.runtime.run_files import read_json, shortened

logger = logging.getLogger("qfleet")

_PACKAGES = ("qfleet", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "gymnasium", "gymnax", "octax",
             "pgx", "xminigrid", "ale-py", "envpool", "ray")  # fmt: skip

_MAX_STARTS = 100
"""Most starts that a run remembers: the first and the newest."""


def record_start(run: RunDirectory) -> None:
    """Adds this start to the run's environment.json. If that can't be written, it logs a warning."""
    try:
        try:
            starts = read_json(run.environment_path)
        except (FileNotFoundError, ValueError):
            starts = []
        is_ours = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
        starts = [*(starts if is_ours else []), describe_environment()]
        starts = starts if len(starts) <= _MAX_STARTS else [starts[0], *starts[1 - _MAX_STARTS :]]
        write_atomically(run.environment_path, json.dumps(starts, indent=2) + "\n")
    except OSError as error:
        logger.warning("%s can't be written (%s); the run goes on without it", run.environment_path, error.strerror)


class Difference(NamedTuple):
    """Something that isn't as it was when a run was started. Each value is in words; "none" is no value."""

    what: str
    then: str
    now: str


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Returns what differs between two descriptions of environments, of what may change a result.

    Args:
      then: what a run's environment.json holds of a start, which somebody may have changed.
      now: what `describe_environment` returns. What is absent here isn't compared.
    """
    names = ("python", "packages", "system", "processor", "num_cores", "devices", "flags", "git_commit")
    found = []
    for name in (name for name in names if name in now):
        before, after = then.get(name), now[name]
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            pairs = [(name.replace("_", " "), before, after)]
        else:
            if name == "flags":  # those that only say how memory is taken change no result
                before, after = (_without_memory_flags(flags) for flags in (before, after))
            label = {"packages": "", "flags": "", "devices": "device "}[name]
            pairs = [(f"{label}{each}", before.get(each), after.get(each)) for each in sorted({*before, *after})]
        found += [Difference(what, _in_words(old), _in_words(new)) for what, old, new in pairs if old != new]
    return found


def describe_environment() -> dict[str, Any]:
    """Returns versions, devices, hardware, flags, git commit and command of this process, as JSON can hold them."""
    devices = jax.devices()
    first = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    return {**describe_process(), "devices": first}


def describe_process() -> dict[str, Any]:
    """Returns the same without the devices, which need not be started for this."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [shortened(argument, 200) for argument in sys.argv[:100]],
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version_of(name))},
        "system": platform.platform(),
        "processor": _processor(),
        "num_cores": num_cores(),
        "memory_bytes": total_memory_bytes(),
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("JAX_", "XLA_"))},
        "git_commit": git_commit(Path.cwd()),
    }


def _without_memory_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if not name.startswith("XLA_PYTHON_CLIENT_")}


def _in_words(value: Any) -> str:
    return "none" if value is None else shortened(str(value), 100)


def git_commit(folder: Path) -> str | None:
    """Returns the commit of the git repository that a folder is in, or None. It runs nothing and reads two files."""
    for parent in (folder, *folder.parents):
        head = _first_line(parent / ".git" / "HEAD")
        if head is None:
            continue
        if not head.startswith("ref: "):
            return head if _is_commit(head) else None
        name = head.removeprefix("ref: ")
        commit = _first_line(parent / ".git" / name) or _packed(parent / ".git" / "packed-refs", name)
        return commit if commit and _is_commit(commit) else None
    return None


def _is_commit(text: str) -> bool:
    return len(text) in (40, 64) and set(text) <= set("0123456789abcdef")


def _first_line(path: Path) -> str | None:
    try:
        if not path.is_file():
            return None
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(1000).strip()
    except OSError:
        return None


def _packed(path: Path, name: str) -> str | None:
    """Returns the commit of a reference in a file of packed references."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError:
        return None
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {name}")), None)


@functools.cache  # a sweep asks for every trial, and reading them takes 20 ms
def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not on Linux
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
