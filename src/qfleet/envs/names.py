"""What stands before the colon in an environment's name: a backend, or a Python module to import."""

import importlib

from qfleet.config.errors import ConfigError, suggest

BACKENDS = {
    "gymnax": "qfleet.envs.gymnax",
    "gym": "qfleet.envs.gymnasium",
    "ale": "qfleet.envs.ale",
    "envpool": "qfleet.envs.envpool",
}
"""Those that are ours, and the module whose `make` takes what stands after the colon."""


def import_module_of(name: str) -> tuple[str, str]:
    """Imports MODULE of `MODULE:NAME` and returns both; without a colon there is nothing to import, and '' returned.

    Raises:
      ConfigError: if it can't be imported.
    """
    module, separator, local_name = name.rpartition(":")
    if separator:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the user's module raises is what is wrong with it
            raise ConfigError(
                f"what stands before the colon must be {', '.join(BACKENDS)} or a Python module that can be imported, "
                f"got {module!r} ({type(error).__name__}: {error}).{suggest(module, BACKENDS)}"
            ) from error
    return module, local_name
