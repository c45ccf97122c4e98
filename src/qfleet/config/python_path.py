"""Which folders Python imports from, here and in processes that are started.

The current folder may hold anything, such as a run that somebody else made. If it comes first in `sys.path`, as Python
puts it for `python -m` and `python -c`, a file named random.py or zstandard.py in it runs in place of the real module.
So qfleet searches it last, and only while it imports a module that the user has named.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from qfleet.config.errors import ConfigError

_FOLDER = "QFLEET_MODULE_FOLDER"
"""Variable that tells processes on Ray, which may have another current folder, where the user's modules are."""

_SAFE_PATH = "PYTHONSAFEPATH"
_OURS = "qfleet"


def module_folder() -> str:
    """Returns the folder with the user's modules: the current folder of the process that the user started."""
    return os.environ.get(_FOLDER) or os.getcwd()


def module_folder_variables() -> dict[str, str]:
    """Returns the environment variables that make `module_folder` the same folder in another process."""
    return {_FOLDER: module_folder()}


@contextlib.contextmanager
def module_folder_searched() -> Iterator[None]:
    """Makes Python search the folder with the user's modules meanwhile, after all other folders."""
    folder = module_folder()
    if folder in sys.path or ("" in sys.path and folder == os.getcwd()):
        yield
        return
    global _is_searched
    sys.path.append(folder)
    _is_searched = True
    try:
        yield
    finally:
        _is_searched = False
        with contextlib.suppress(ValueError):  # the module itself may have removed it
            sys.path.remove(folder)


def check_trusted_module(module: str, what: str, run: Path, *, trust: bool, otherwise: str = "") -> None:
    """Checks that the user, rather than a run's folder alone, wants a module to be imported.

    Args:
      module: name of the module.
      what: what the folder names, such as "environment my_mazes:Maze-v0".
      run: the run's folder.
      trust: whether the user trusts the module that this folder names.
      otherwise: another remedy, for the error.

    Raises:
      ConfigError: if the module isn't trusted, or would be looked for in the run's folder.
    """
    if not trust:
        raise ConfigError(
            f"a module that only a run's folder names must be trusted before it is imported, because importing it runs "
            f"its code: {run / 'config.json'} names {what}, of module {module}; if you trust that module, "
            f"give --trust (in Python: trust=True{otherwise})"
        )
    if Path(os.path.realpath(module_folder())).is_relative_to(os.path.realpath(run)):
        raise ConfigError(
            f"nothing in a run's folder is ever imported, so module {module} can't be looked for in {module_folder()}, "
            f"which is part of run {run.absolute()}; change to the folder with your module and give the run's path"
        )


def is_module_folder_searched() -> bool:
    """Returns whether `module_folder_searched` has added the folder. Processes started meanwhile take over the path."""
    return _is_searched


def leave_module_folder() -> None:
    """Ends `module_folder_searched` in a process that was started while it had added the folder."""
    with contextlib.suppress(ValueError):  # a module may have removed it
        sys.path.remove(module_folder())


_is_searched = False


@contextlib.contextmanager
def starts_safely() -> Iterator[None]:
    """Keeps the current folder off the path of Python processes that are started meanwhile.

    Such a process should call `forget_safe_start`, so that this does not reach the programs that it starts itself.
    """
    if os.environ.get(_SAFE_PATH):
        yield
        return
    os.environ[_SAFE_PATH] = _OURS  # any text will do
    try:
        yield
    finally:
        del os.environ[_SAFE_PATH]


def forget_safe_start() -> None:
    """Lets programs that this process starts have Python's usual path, unless the user has asked for a safe one."""
    if os.environ.get(_SAFE_PATH) == _OURS:
        del os.environ[_SAFE_PATH]
