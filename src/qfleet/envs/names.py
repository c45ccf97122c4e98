"""The part of an environment's name before the colon: a backend, or a Python module to import."""

import importlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from qfleet.config.errors import ConfigError, suggest

BACKENDS = {
    "gymnax": "qfleet.envs.gymnax",
    "gym": "qfleet.envs.gymnasium",
    "ale": "qfleet.envs.ale",
    "envpool": "qfleet.envs.envpool",
    "factory": "qfleet.envs.factory",
}
"""The module of each backend. Its `make` takes the part of the name after the colon."""


def import_module_of(name: str) -> tuple[str, str]:
    """Imports MODULE of `MODULE:NAME` and returns both parts. Without a colon, imports nothing and returns '' for it.

    Raises:
      ConfigError: if the module can't be imported.
    """
    module, separator, local_name = name.rpartition(":")
    if separator:
        try:
            importlib.import_module(module)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(
                f"the part before the colon must be {', '.join(BACKENDS)} or a Python module that can be imported, "
                f"got {module!r} ({type(error).__name__}: {error}).{suggest(module, BACKENDS)}"
            ) from error
    return module, local_name


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
