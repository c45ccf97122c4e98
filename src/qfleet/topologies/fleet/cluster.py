"""Connects to a Ray cluster for as long as a run lasts.

The cluster is either one that somebody else has started, or a local one, which is started for the run on this machine
alone and ends with the run.
"""

import contextlib
import logging
import os
import secrets
import signal
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from qfleet.config import ConfigError
from qfleet.config.node_labels import has_labels
from qfleet.config.python_path import module_folder_variables

try:
    import ray
except ImportError as error:
    raise ConfigError(f"this run needs Ray ({error}); pip install 'qfleet[ray]'") from error

from qfleet.topologies.fleet.private_folder import private_folder
from qfleet.topologies.fleet.ray_internals import on_loopback, path_of_this_process_only, read_variables_again

logger = logging.getLogger("qfleet")

_FIRST_WITH_LABELS = Version("2.50")
"""Oldest version of Ray that chooses nodes by labels in the way that is asked for here."""

_PASSED_ON = ("GLOO_", "JAX_", "NCCL_", "QFLEET_", "XLA_")
"""Prefixes of the variables that processes take from the launcher's environment instead of their node's."""

_is_local = False
"""Whether this process is connected to a local Ray that it has started."""

_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""The variables by which a user names a token. Without them Ray takes the token of the home folder."""


@contextlib.contextmanager
def connected(address: str, num_cpus: int, what: str) -> Iterator[bool]:
    """Keeps this process connected to Ray, and yields whether Ray's processes inherit what `variables` returns.

    If the process is connected already, it uses that connection and leaves it open.

    Args:
      address: `local` starts a Ray that only processes of this machine can reach, and only with its token. `auto` or
        HOST:PORT joins a cluster, by Ray's own settings.
      num_cpus: least number of CPUs of a local Ray, even if the machine has fewer cores: with or without Ray, a run may
        have more processes than there are cores.
      what: name of the setting that the address comes from.

    Raises:
      ConfigError: if there is no cluster at the address, it can't be joined, or Ray can't start on this machine.
    """
    global _is_local
    if ray.is_initialized():
        yield False
        return
    with contextlib.ExitStack() as stack:
        if address == "local":
            stack.enter_context(_own_token())
        try:
            _connect(address, num_cpus, stack.enter_context(private_folder()) if address == "local" else None)
        except ConfigError:
            raise
        except Exception as error:  # Ray raises plain ones, such as when its processes take too long to start
            if address == "local":
                raise ConfigError(
                    f"with {what} local, Ray must start on this machine, got the error ({error}); try again when the "
                    f"machine is less busy, or start Ray with `ray start --head` and give auto"
                ) from error
            raise ConfigError(
                f"{what} must be the address of a Ray cluster that this machine is part of, got {address} ({error}); "
                f"start one with `ray start --head`, set RAY_AUTH_MODE=token if it wants a token, or give local"
            ) from error
        _is_local = address == "local"
        try:
            yield _is_local
        finally:
            _is_local = False
            ray.shutdown()


def is_local() -> bool:
    """Returns whether this process has started its Ray, so that all of Ray is on this machine."""
    return _is_local


def variables() -> dict[str, str]:
    """Returns the environment variables that all processes of a run take from this process.

    `PYTHONPATH` holds the folders that come before those of the node.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    found |= module_folder_variables()
    for name in ("OMP_NUM_THREADS", "PJRT_NPROC"):
        if name in os.environ:
            found[name] = os.environ[name]
    # The user's own modules are found where this process finds them, installed packages where the node has them.
    installed = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    folders = [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")]
    own = [path for path in dict.fromkeys(folders) if not _is_in(os.path.realpath(path), installed)]
    return found | {"PYTHONPATH": os.pathsep.join(own)}


def check_can_choose_nodes(wanted: Mapping[str, Mapping[str, str]]) -> None:
    """Checks that Ray can choose nodes by labels. If no node has the labels yet, warns of that.

    Args:
      wanted: labels that nodes must have, by the setting that asks for them.

    Raises:
      ConfigError: if this version of Ray can't.
    """
    if wanted and Version(ray.__version__) < _FIRST_WITH_LABELS:
        raise ConfigError(
            f"{' and '.join(wanted)} must come with Ray {_FIRST_WITH_LABELS} or newer, got {ray.__version__}; "
            f"pip install --upgrade ray"
        )
    for setting, labels in wanted.items():
        if not _num_nodes(labels)[0]:
            logger.warning(
                "no node of the Ray cluster has %s yet, which %s asks for; waiting for one",
                in_words({}, labels),
                setting,
            )


def _num_nodes(labels: Mapping[str, str]) -> tuple[int, int]:
    """Returns how many nodes of the cluster have these labels, and how many nodes there are."""
    nodes = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    return sum(has_labels(node, labels) for node in nodes), len(nodes)


def room(resources: Iterable[str], labels: Mapping[str, str]) -> str:
    """Returns in words how much of these resources the cluster has free, how much it has, and where.

    Args:
      resources: names of resources.
      labels: that a node must have.
    """
    names = list(resources)
    free, total = (
        in_words({name: amounts.get(name, 0) for name in names})
        for amounts in (ray.available_resources(), ray.cluster_resources())
    )
    matching, num_nodes = _num_nodes(labels)
    where = f", and {matching} of {num_nodes} nodes with {in_words({}, labels)}" if labels else ""
    return f"{free} free of {total}{where}"


def in_words(amounts: Mapping[str, float], labels: Mapping[str, str] | None = None) -> str:
    """Returns what a process wants of a node in words, such as `1 CPU and 2 GPU and label zone=a`."""
    wanted = [f"{amount:g} {name}" for name, amount in amounts.items()]
    return " and ".join(wanted + [f"label {name}={value}" for name, value in (labels or {}).items()])


def last_line(error: Exception) -> str:
    """Returns what went wrong, which an error of Ray says in its last line, after the traceback."""
    return str(error).strip().splitlines()[-1]


def _is_in(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _connect(address: str, num_cpus: int, folder: Path | None) -> None:
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the supervisor asks for errors and reports each once
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "WARNING"}
    if folder is None:
        _init(settings)
        return
    settings |= {"num_cpus": max(os.cpu_count() or 1, num_cpus), "include_dashboard": False, "_temp_dir": str(folder)}
    path = os.pathsep.join(filter(None, (variables()["PYTHONPATH"], os.environ.get("PYTHONPATH"))))
    with on_loopback(), _set({"PYTHONPATH": path, **module_folder_variables()}):
        _init(settings)


def _init(settings: dict[str, Any]) -> None:
    """Calls `ray.init`, and undoes what it does to this process."""
    with process_kept_as_it_is():
        ray.init(**settings, job_config=path_of_this_process_only())


@contextlib.contextmanager
def process_kept_as_it_is() -> Iterator[None]:
    """Undoes what Ray does to this process when it starts its own ones, and hides warnings of its forks."""
    handler, group = signal.getsignal(signal.SIGTERM), os.getpgrp()
    try:
        with warnings.catch_warnings():
            # Ray forks to start its own processes. These exec at once, so they miss no thread of this process.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            warnings.filterwarnings("ignore", r".*use of fork\w*\(\) may lead to deadlocks", DeprecationWarning)
            yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        # A Ray that is started here moves this process to a process group of its own, so that Ray's processes die with
        # it. But then Ctrl-C would no longer reach this process.
        if os.getpgrp() != group:
            with contextlib.suppress(OSError):
                os.setpgid(0, group)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Makes a Ray that is started meanwhile answer only callers with its token: the user's, or else a new one.

    By default, Ray takes the token of a file in the home folder, which other users can read if they can enter the
    folder; before 2.60 it takes none. The new token exists only in the environment of this process and of Ray's
    processes, which other users can't read.
    """
    settings = {"RAY_AUTH_MODE": "token"}
    if not any(map(os.environ.get, _TOKENS)):
        settings["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        with _set(settings):
            read_variables_again()
            yield
    finally:
        read_variables_again()


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables of this process meanwhile, which processes that it starts inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
