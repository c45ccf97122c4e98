"""The part of an environment's name before the colon: a backend, or a Python module to import."""

import importlib

from qfleet.config.errors import ConfigError, suggest

BACKENDS = {
    "gymnax": "qfleet.envs.gymnax",
    "gym": "qfleet.envs.gymnasium",
    "ale": "qfleet.envs.ale",
    "envpool": "qfleet.envs.envpool",
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
