"""Parts of an agent that users write: their names, MODULE:NAME, in a config, and what these names mean.

A name works in every process, on the command line and in a run's config.json, because each process imports the module.
The function that it names returns the part:

| setting | function | what it returns |
|---|---|---|
| `network` | `make(spec, config)` | a `qfleet.core.types.Network` |
| `head` | `make(config)` | a `qfleet.core.heads.Head` |
| `target` | `make(config)` | a `qfleet.core.own_targets.Target` |
| `exploration` | `make(config)` | a function like `qfleet.core.exploration.epsilon_greedy` |

`spec` is an `EnvSpec`, and `config` an `AgentConfig`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qfleet.config.errors import RAISED_BY_USERS, ConfigError, short, suggest
from qfleet.config.python_path import check_trusted_module, module_folder_searched

OWN_PARTS = ("network", "head", "target", "exploration")
"""Settings of an agent that may name a part of the user's own."""

_used: set[str] = set()  # names that this process was given by its user, or told to trust


def is_own_name(value: Any) -> bool:
    """Returns whether a setting has the form MODULE:NAME."""
    module, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return name.isidentifier() and all(each.isidentifier() for each in module.split("."))


def own_parts(agent: Any) -> dict[str, str]:
    """Returns the names of an agent config's own parts, by setting."""
    return {name: getattr(agent, name) for name in OWN_PARTS if is_own_name(getattr(agent, name))}


def parts_of_policy(agent: Any) -> dict[str, str]:
    """Returns the names of those own parts that acting greedily needs: the network, or the head of the built-in one."""
    parts = own_parts(agent)
    return {name: parts[name] for name in ("network", "head")[: 1 if "network" in parts else 2] if name in parts}


def make_own_part(setting: str, name: str, *arguments: Any) -> Any:
    """Returns what the user's function returns for these arguments.

    Args:
      setting: the setting that names the function, such as "head".
      name: MODULE:NAME. The module may be in the current folder, which is searched last.
      *arguments: arguments of the function.

    Raises:
      ConfigError: if the module can't be imported, has nothing of that name, or the function takes other arguments or
        raises an error.
    """
    with module_folder_searched():
        make = _import(setting, name)
        try:
            inspect.signature(make).bind(*arguments)
        except TypeError as error:
            takes = ", ".join(("spec", "config")[-len(arguments) :])
            raise ConfigError(
                f"{setting} must name a function of ({takes}), got {name}, which can't be called so ({error}); give it "
                f"these arguments"
            ) from error
        except ValueError:  # some functions written in C have no signature
            pass
        try:
            made = make(*arguments)
        except ConfigError:
            raise
        except RAISED_BY_USERS as error:  # a user's function may raise anything
            raise ConfigError(
                f"{setting} must name a function that returns it, got {name}, which raised {short(error)}; mend it"
            ) from error
    _used.add(name)
    return made


def make_own_function(setting: str, name: str, call: str, *arguments: Any) -> Callable[..., Any]:
    """Returns what `make_own_part` does, which must be a function that is called as `call` says.

    Raises:
      ConfigError: as `make_own_part` does, or if it is no function.
    """
    made: Callable[..., Any] = make_own_part(setting, name, *arguments)
    if not callable(made):
        raise ConfigError(
            f"{setting} must name a function that returns {call}, got {name}, which returned a "
            f"{type(made).__name__}; return a function"
        )
    return made


def _import(setting: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(":")
    try:
        imported = importlib.import_module(module)
    except RAISED_BY_USERS as error:  # a user's module may raise anything
        raise ConfigError(
            f"{setting} must be in a Python module that can be imported, got {name} ({short(error)}); start in the "
            f"folder of {module.replace('.', '/')}.py, or install the module"
        ) from error
    if not hasattr(imported, attribute):
        near = suggest(attribute, vars(imported))
        raise ConfigError(f"{setting} must be in its module, got {name}, and {module} has no {attribute}.{near}")
    made: Callable[..., Any] = getattr(imported, attribute)
    if not callable(made):
        raise ConfigError(
            f"{setting} must name a function that returns it, got {name}, a {type(made).__name__}; put it into one"
        )
    return made


def check_parts_trusted(parts: Mapping[str, str], run: Path, *, trust: bool) -> None:
    """Checks that the user, rather than a run's folder alone, wants code of these modules to run.

    Unlike an environment's module, it makes no difference whether the module is imported already: importing it does no
    harm then, but its function is called, and a folder could name any function. It does make a difference whether this
    program has used the part before.

    Args:
      parts: names of the run's own parts, by setting.
      run: the run's folder.
      trust: whether the user trusts the modules that this folder names.

    Raises:
      ConfigError: if a module isn't trusted, or would be looked for in the run's folder.
    """
    for setting, name in parts.items():
        module = name.rpartition(":")[0]
        if name not in _used and not (trust and module in sys.modules):
            check_trusted_module(module, f"{setting} {name}", run, trust=trust)


def check_parts_can_travel(parts: Mapping[str, str]) -> None:
    """Raises ConfigError if processes that don't run the user's script can't import a part."""
    for setting, name in parts.items():
        if name.startswith("__main__:"):
            raise ConfigError(
                f"a run in several processes must import its {setting} in each of them, got {name}, which is in the "
                f"script that is run; put it into a module that they can import, or train in this process alone: one "
                f"seed, in topology overlapped or fused"
            )
