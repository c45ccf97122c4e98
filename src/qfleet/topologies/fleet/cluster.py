"""A connection to a Ray cluster for as long as a run lasts, and what of it concerns every topology that uses Ray.

The cluster is one that others started, or one of this machine alone, which is started for the run and ends with it.
"""

import contextlib
import os
import secrets
import signal
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qfleet.config import ConfigError

try:
    import ray
except ImportError as error:
    raise ConfigError(f"this topology needs Ray ({error}); pip install 'qfleet[ray]'") from error

_PASSED_ON = ("GLOO_", "JAX_", "NCCL_", "QFLEET_", "XLA_")
"""How the names of variables begin that processes take from the launcher's environment, and not from their node's."""

_is_local = False

_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""The variables by which a user names a token; without them Ray takes that of the home folder."""


@contextlib.contextmanager
def connected(address: str, num_cpus: int, what: str) -> Iterator[bool]:
    """Keeps this process connected to Ray, and yields whether Ray's processes inherit what `variables` returns.

    Where it is connected already, that connection is used, and stays.

    Args:
      address: `local` for a Ray that is started here, and which only this machine reaches, by its token; else `auto` or
        HOST:PORT, where Ray's own settings hold.
      num_cpus: that a local Ray has at least, however many the machine has: as without Ray, there may be more processes
        than cores.
      what: name of the setting that the address comes from.

    Raises:
      ConfigError: if there is no cluster at the address, or it can't be joined.
    """
    global _is_local
    if ray.is_initialized():
        yield False
        return
    with _own_token() if address == "local" else contextlib.nullcontext():
        try:
            _connect(address, num_cpus)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"{what} must be that of a Ray cluster that this machine is part of, got {address} ({error}); start "
                f"one with `ray start --head`, set RAY_AUTH_MODE=token if it wants a token, or give local"
            ) from error
        _is_local = address == "local"
        try:
            yield _is_local
        finally:
            _is_local = False
            ray.shutdown()


def is_local() -> bool:
    """Returns whether Ray is one that this process has started, so that all of it is on this machine."""
    return _is_local


def variables() -> dict[str, str]:
    """Returns the variables of this process's environment that are those of all processes of a run.

    Of `PYTHONPATH` it is what comes before that of the node.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    for name in ("OMP_NUM_THREADS", "PJRT_NPROC"):
        if name in os.environ:
            found[name] = os.environ[name]
    # Modules of the user's own are found as here; what is installed is found as on the node.
    installed = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    folders = [os.path.abspath(path) for path in sys.path if os.path.isdir(path or ".")]
    own = [path for path in dict.fromkeys(folders) if not _is_in(os.path.realpath(path), installed)]
    return found | {"PYTHONPATH": os.pathsep.join(own)}


def room(resources: Iterable[str]) -> str:
    """Returns in words how much of these resources the cluster has free, and has."""
    names = list(resources)
    free, total = (
        in_words({name: amounts.get(name, 0) for name in names})
        for amounts in (ray.available_resources(), ray.cluster_resources())
    )
    return f"{free} free of {total}"


def in_words(amounts: Mapping[str, float]) -> str:
    """Returns such as `1 CPU and 2 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def last_line(error: Exception) -> str:
    """Returns what went wrong; an error of Ray's says first where it did."""
    return str(error).strip().splitlines()[-1]


def _is_in(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _connect(address: str, num_cpus: int) -> None:
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # those that matter are asked for, and told once
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "WARNING"}
    if address != "local":
        _init(settings)
        return
    settings |= {"num_cpus": max(os.cpu_count() or 1, num_cpus), "include_dashboard": False}
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (variables()["PYTHONPATH"], path)))
    try:
        with _on_loopback():
            _init(settings)
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def _init(settings: dict[str, Any]) -> None:
    """Calls `ray.init`, and takes back what it does to this process."""
    handler, group = signal.getsignal(signal.SIGTERM), os.getpgrp()
    try:
        with warnings.catch_warnings():
            # Ray forks to start its own processes, which replace themselves at once: no thread is missed in them.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            warnings.filterwarnings("ignore", r".*use of fork\w*\(\) may lead to deadlocks", DeprecationWarning)
            ray.init(**settings)
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        # A Ray that is started here leaves the process group, for its processes to die with this one; but Ctrl-C would
        # no longer come here.
        if os.getpgrp() != group:
            with contextlib.suppress(OSError):
                os.setpgid(0, group)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Has a Ray that is started meanwhile listen to this machine only; by itself, on Linux, it listens to all others.

    Where a cluster can't be had, as on macOS, Ray keeps to loopback. There is no setting that asks for it: of a
    `_node_ip_address` of 127.0.0.1 it makes the one that other machines know.
    """
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Has a Ray that is started meanwhile answer only those with its token: the user's, or one of its own.

    By default Ray takes a token from a file in the home folder, which it lets others read where they can enter, or none
    before 2.60. This one is in the environment of this process and of Ray's only, which other users can't read.
    """
    settings = {"RAY_AUTH_MODE": "token"}
    if not any(map(os.environ.get, _TOKENS)):
        settings["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _read_settings_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_settings_again()


def _read_settings_again() -> None:
    """Has Ray read its variables again, which it otherwise does once in a process."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    if hasattr(raylet, "AuthenticationTokenLoader"):  # an older Ray knows of no tokens
        raylet.AuthenticationTokenLoader.instance().reset_cache()
