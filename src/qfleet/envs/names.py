"""The part of an environment's name before the colon: a backend, or a Python module to import."""

import contextlib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from qfleet.config.errors import RAISED_BY_USERS, ConfigError, short, suggest
from qfleet.config.python_path import check_trusted_module, module_folder_searched

SUITES = ("gymnax", "octax", "pgx", "xminigrid")
"""The backends that are suites written in JAX, each with an extra of its name."""

BACKENDS = {
    **dict.fromkeys(SUITES, "qfleet.envs.suites"),
    "gym": "qfleet.envs.gymnasium",
    "ale": "qfleet.envs.ale",
    "envpool": "qfleet.envs.envpool",
    "factory": "qfleet.envs.factory",
}
"""The module of each backend. Its `make` takes the part of the name after the colon; that of a suite, both parts."""


def is_of_suite(name: str) -> bool:
    """Returns whether a name stands for an environment of a suite written in JAX."""
    prefix, separator, _ = name.partition(":")
    return bool(separator) and prefix in SUITES


def module_in(name: str) -> str:
    """Returns the Python module that making an environment of this name imports: MODULE of `MODULE:NAME`, or ''."""
    prefix, separator, rest = name.partition(":")
    if separator and prefix == "gym":  # whose own names may have a module too
        name = rest
    elif separator and prefix in BACKENDS:
        return ""
    return name.rpartition(":")[0]


def searched_for(name: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the module of an environment's name, and what it imports, can be imported."""
    return module_folder_searched() if module_in(name) else contextlib.nullcontext()


def import_module_of(name: str) -> tuple[str, str]:
    """Imports MODULE of `MODULE:NAME` and returns both parts. Without a colon, imports nothing and returns '' for it.

    The module may be in the current folder, which is searched last.

    Raises:
      ConfigError: if the module can't be imported.
    """
    module, separator, local_name = name.rpartition(":")
    if separator:
        try:
            with module_folder_searched():
                importlib.import_module(module)
        except RAISED_BY_USERS as error:  # a user's module may raise anything
            raise ConfigError(
                f"the part before the colon must be {', '.join(BACKENDS)} or a Python module that can be imported, "
                f"got {module!r} ({short(error)}).{suggest(module, BACKENDS)}"
            ) from error
    return module, local_name


def check_trusted(name: str, run: Path, *, trust: bool) -> None:
    """Checks that the user, rather than a run's folder alone, wants the module of an environment to be imported.

    Args:
      name: name of the environment in the run's config.json.
      run: the run's folder.
      trust: whether the user trusts the module that this folder names.

    Raises:
      ConfigError: if the module isn't imported yet and either isn't trusted or would be looked for in the run's folder.
    """
    module = module_in(name)
    if module and module not in sys.modules:
        check_trusted_module(module, f"environment {name}", run, trust=trust, otherwise=", or import the module first")


def module_that_registers(name: str) -> str | None:
    """Returns the installed module that registers an id with Gymnasium when imported, or None if none is known to.

    It imports nothing. It looks for the id in the first file of each module whose package needs Gymnasium.
    """
    quoted = re.compile(rf"""["']{re.escape(name)}["']""")
    for module, file in _modules_with_gymnasium():
        if quoted.search(file.read_text(encoding="utf-8", errors="replace")):
            return module
    return None


def _modules_with_gymnasium() -> Iterator[tuple[str, Path]]:
    """Yields the installed modules, each with its `__init__.py`, of packages that name Gymnasium as a requirement."""
    for distribution in importlib.metadata.distributions():
        if not any(re.match(r"gymnasium\b", requirement) for requirement in distribution.requires or ()):
            continue
        for path in distribution.files or ():
            if len(path.parts) == 2 and path.name == "__init__.py" and path.parts[0].isidentifier():
                file = Path(str(path.locate()))
                if file.is_file():
                    yield path.parts[0], file
