"""Environments that a program hands over as functions, and the names under which runs record them.

A name begins with `factory:`. It means something only in the process that was given the function.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qfleet.config.errors import ConfigError

if TYPE_CHECKING:
    from qfleet.envs.host import HostEnv
    from qfleet.envs.spec import InGraphEnv

FACTORY = "factory:"
"""Beginning of the names of environments that were given as functions."""

_factories: dict[str, Callable[..., Any]] = {}


def name_of_factory(factory: Any) -> str:
    """Returns the name under which a run records an environment that was given as a function, and remembers both.

    Args:
      factory: a function or class that returns a new environment each time.

    Raises:
      ConfigError: if it isn't callable.
    """
    for name, known in _factories.items():
        if known is factory:
            return name
    label = getattr(factory, "__qualname__", type(factory).__name__).rpartition(".")[2].strip("<>")
    name, number = FACTORY + label, 1
    while name in _factories:
        number += 1
        name = f"{FACTORY}{label}-{number}"
    remember_factory(name, factory)
    return name


def remember_factory(name: str, factory: Any) -> None:
    """Makes a name that a run has recorded mean a function in this process.

    Raises:
      ConfigError: if the run recorded another kind of name, or the function isn't callable.
    """
    if not name.startswith(FACTORY):
        raise ConfigError(
            f"`env` must be left out for a run whose environment has a name, got one for a run in {name}; leave it out"
        )
    if not callable(factory):
        raise ConfigError(
            f"`env` must be a name (in make_config) or a function that makes a new environment each time, got a "
            f"{type(factory).__name__}; give a function, such as `lambda: gymnasium.make(...)`"
        )
    _factories[name] = factory


def make(label: str, /, **options: Any) -> "InGraphEnv | HostEnv":
    """Returns the environment that the function of this name makes.

    Raises:
      ConfigError: if this process wasn't given the function, or what it returns isn't an environment to learn in.
    """
    from qfleet.envs.registry import make_by  # here, because the registry imports this module

    return make_by(FACTORY + label, factory_of(FACTORY + label), options)


def factory_of(name: str) -> Callable[..., Any]:
    """Returns the function that a recorded name means.

    Raises:
      ConfigError: if this process was never given it.
    """
    if name not in _factories:
        raise ConfigError(
            f"the environment {name} is a function that another process was given; give it again, as in "
            f"qfleet.load(run, env=make_my_env), or register it with qfleet.register_env in a module that can be "
            f"imported, and train in MODULE:NAME"
        )
    return _factories[name]
