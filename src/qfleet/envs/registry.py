"""Names of environments: qfleet's own, those of suites in JAX, Gymnasium, ALE and EnvPool, and those of users.

This module doesn't import JAX until an environment is made, so that the command line can list names at once.
"""

import functools
import importlib
import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qfleet.config.errors import RAISED_BY_USERS, ConfigError, short, suggest
from qfleet.envs.factory import FACTORY, factory_of
from qfleet.envs.names import BACKENDS, SUITES, import_module_of, is_of_suite, module_that_registers, searched_for

if TYPE_CHECKING:
    import gymnasium

    from qfleet.envs.host import HostEnv
    from qfleet.envs.spec import InGraphEnv

_OURS = {
    "CartPole-v1": "qfleet.envs.cartpole",
    "Acrobot-v1": "qfleet.envs.acrobot",
    "MountainCar-v0": "qfleet.envs.mountain_car",
}
_MINATAR = ("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar")

_Make = Callable[..., "InGraphEnv | HostEnv | gymnasium.Env"]

_registered: dict[str, _Make] = {}


def register_env(name: str, make: _Make) -> None:
    """Gives an environment a name. `make_env(name, **options)` then calls `make(**options)` and checks the result.

    `make` returns an `InGraphEnv`, a `HostEnv`, or a `gymnasium.Env`, which must be a new one each time.

    Registering a name again replaces it, so that a notebook cell may run twice.

    Raises:
      ConfigError: if the name is empty, contains a colon (which separates a module from a name) or is built in, or if
        `make` isn't a function or class.
    """
    if not isinstance(name, str) or not name or ":" in name or name in _OURS:
        other = "My" + str(name).replace(":", "-")
        raise ConfigError(f"an environment's name must be new and contain no colon, got {name!r}; try {other!r}")
    if not callable(make):
        raise ConfigError(
            f"environment {name} must be registered with a function that makes a new environment each time, got a "
            f"{type(make).__name__}; give a function, such as `lambda: gymnasium.make(...)`"
        )
    _registered[name] = make


def list_envs() -> list[tuple[str, str]]:
    """Returns `(name, description)` of every environment that can be named without importing anything."""
    return [
        *((name, "built in, in JAX") for name in _OURS),
        *((name, "registered by this program") for name in _registered),
        *((f"gymnax:{name}", "gymnax, in JAX (extra 'gymnax')") for name in _MINATAR),
        ("gymnax:NAME", "any other environment of gymnax with discrete actions"),
        ("octax:GAME", "CHIP-8 games of octax in JAX, such as octax:pong (extra 'octax')"),
        ("pgx:GAME", "games of pgx for one player in JAX, such as pgx:2048 (extra 'pgx')"),
        ("xminigrid:NAME", "MiniGrid in JAX, such as xminigrid:MiniGrid-DoorKey-5x5 (extra 'xminigrid')"),
        ("gym:NAME", "Gymnasium's with discrete actions, such as gym:LunarLander-v3 (extra 'box2d')"),
        ("NAME", "the same, if no environment above has that name"),
        ("ale:GAME", "Atari on ALE's threads, such as ale:Pong (extra 'atari')"),
        ("envpool:NAME", "EnvPool's, such as envpool:Pong-v5 (extra 'envpool')"),
        ("MODULE:NAME", "yours: the Python module MODULE registers NAME with qfleet or Gymnasium when imported"),
    ]


def list_suite(suite: str) -> list[str]:
    """Returns the names of a suite's environments, each with the suite's prefix. This imports the suite.

    Those of gymnax include some with continuous actions, which can't be trained in.

    Raises:
      ConfigError: if there is no such suite, or it isn't installed.
    """
    if suite not in SUITES:
        raise ConfigError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}.{suggest(suite, SUITES)}")
    from qfleet.envs import suites

    return [f"{suite}:{name}" for name in suites.names(suite)]


def make_env(name: str, /, **options: Any) -> "InGraphEnv | HostEnv":
    """Returns the environment of that name, in any of the forms that `list_envs` lists.

    A bare name is looked up first among the built-in environments, then among those that this program registered, then
    among Gymnasium's.

    Args:
      name: name of the environment.
      **options: arguments of its maker, such as `repeat_action_probability` of `ale:` games.

    Raises:
      ConfigError: if there is no such environment, its module can't be imported, its maker doesn't take these options,
        or a registered environment breaks the contract.
    """
    try:
        _, make = _find(name)
        with searched_for(name):  # a name may be registered with the name of another module
            return make(**options)
    except TypeError as error:  # Python's error for an argument that a function doesn't have
        if options:
            raise ConfigError(f"env_options must be options that {name} takes, got {options} ({error})") from error
        raise


def backend_of(name: str) -> str:
    """Returns the backend of an environment: in-graph (built in), the suite, registered, gymnasium, ale or envpool.

    Raises:
      ConfigError: if there is no environment of that name, or its module can't be imported.
    """
    backend, _ = _find(name)
    return backend


def _find(name: str) -> "tuple[str, Callable[..., InGraphEnv | HostEnv]]":
    """Returns the backend of a name, and the function that makes the environment from its options."""
    if name in _OURS:
        return "in-graph", importlib.import_module(_OURS[name]).make
    prefix, separator, rest = name.partition(":")
    if separator and prefix in BACKENDS:
        backend = importlib.import_module(BACKENDS[prefix])
        if prefix in SUITES:
            return prefix, functools.partial(backend.make, prefix, rest)
        return backend.__name__.rpartition(".")[2], functools.partial(backend.make, rest)
    module, local_name = import_module_of(name)
    if local_name in _registered:
        make = _registered[local_name]
        return "registered", lambda **options: make_by(name, make, options)
    _check_in_gymnasium(name, module, local_name)
    return "gymnasium", functools.partial(importlib.import_module(BACKENDS["gym"]).make, name)


def make_by(name: str, make: _Make, options: Mapping[str, Any]) -> "InGraphEnv | HostEnv":
    """Returns the environment that a user's maker returns, after checking it.

    Raises:
      ConfigError: if the maker fails, doesn't take the options, or returns something else.
    """
    import gymnasium

    env = _call(name, make, options)
    if isinstance(env, gymnasium.Env):
        from qfleet.envs.gymnasium import from_maker

        return from_maker(name, cast("Callable[..., gymnasium.Env]", make), dict(options), env)
    check_env(env, name)
    from qfleet.envs.checked_lanes import checked
    from qfleet.envs.host import HostEnv
    from qfleet.envs.spec import with_masks_joined

    if not isinstance(env, HostEnv):
        return with_masks_joined(env)
    return checked(env) if env.encoder is None else env  # an encoder checks what it encodes


def _call(name: str, make: _Make, options: Mapping[str, Any]) -> "InGraphEnv | HostEnv | gymnasium.Env":
    """Returns what a user's maker returns, and says which environment it is if it fails."""
    from qfleet.envs.failures import describe

    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ConfigError(
            f"env_options must be options that the maker of {name} takes, got {dict(options)} ({error})"
        ) from error
    except ValueError:  # some functions written in C have no signature
        pass
    try:
        return make(**options)
    except ConfigError:
        raise
    except RAISED_BY_USERS as error:  # a user's function may raise anything
        raise ConfigError(f"environment {name}: its maker must return an environment, got {describe(error)}") from error


def default_topology(name: str, /, **options: Any) -> str:
    """Returns the name of the topology that suits an environment: `fused` if it is written in JAX, or `overlapped`.

    The name tells which kind an environment is, unless the user registered it. Then this makes the environment, with
    these options, to see.
    """
    backend, separator, _ = name.partition(":")
    if name in _OURS or is_of_suite(name):
        return "fused"
    if name.startswith(FACTORY):
        make = factory_of(name)
    elif separator and backend in BACKENDS:
        return "overlapped"
    else:
        _, local_name = import_module_of(name)
        if local_name not in _registered:
            return "overlapped"
        make = _registered[local_name]

    from qfleet.envs.spec import InGraphEnv

    with searched_for(name):
        env = _call(name, make, options)
    if isinstance(env, InGraphEnv):
        return "fused"
    if callable(close := getattr(env, "close", None)):
        close()
    return "overlapped"


def check_can_travel(name: str) -> None:
    """Raises ConfigError if processes that don't run the user's script can't find an environment by its name."""
    module, _, local_name = name.rpartition(":")
    if name.startswith(FACTORY) or module in ("__main__", "gym:__main__"):
        what = "is a function of this program" if name.startswith(FACTORY) else "is in the script that is run"
    elif not module and local_name in _registered:
        what = "is registered by this program only"
    elif module in ("", "gym") and local_name not in _OURS and not _is_registered_by_gymnasium(local_name):
        what = "is registered with Gymnasium by this program only"
    else:
        return
    remedy = "register it in a module that they can import, and train in MODULE:NAME"
    raise ConfigError(
        f"a run in several processes must find its environment by name in each of them, got {name}, which {what}; "
        f"{remedy}, or train in this process alone: one seed, in topology overlapped or fused"
    )


def _is_registered_by_gymnasium(name: str) -> bool:
    """Returns whether a new process knows an id, because Gymnasium or one of its plugins registers it."""
    import gymnasium

    registered = gymnasium.registry.get(name)
    entry_point = getattr(registered, "entry_point", None) or getattr(registered, "vector_entry_point", None)
    if registered is None or (isinstance(entry_point, str) and entry_point.startswith("gymnasium.envs.")):
        return True  # an unknown id has an error of its own
    code = f"import gymnasium; raise SystemExit({name!r} not in gymnasium.registry)"
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False).returncode == 0


def check_env(env: "InGraphEnv | HostEnv", name: str) -> None:
    """Raises ConfigError if an environment breaks the contract of its kind. It runs nothing, but traces JAX functions.

    `qfleet.envs.conformance.check` runs the environment, and finds more.
    """
    from qfleet.envs.host import HostEnv
    from qfleet.envs.spec import InGraphEnv

    is_env = isinstance(env, InGraphEnv | HostEnv)
    rule = "a gymnasium.Env, an InGraphEnv or a HostEnv"
    _check(is_env, name, "what its make() returns", rule, f"{type(env).__module__}.{type(env).__name__}")
    _check_spec(env.spec, name)
    if isinstance(env, InGraphEnv):
        _check_in_graph(env, name)


def _check_in_gymnasium(name: str, module: str, local_name: str) -> None:
    import gymnasium

    if local_name in gymnasium.registry:
        return
    if module:
        rule = f"module {module} must register {local_name!r} with qfleet.register_env or Gymnasium when imported"
        near = suggest(local_name, [*_registered, *gymnasium.registry])
        raise ConfigError(f"{rule}, it registered no such name.{near}")
    known = dict.fromkeys([*_OURS, *_registered, *(f"gymnax:{minatar}" for minatar in _MINATAR), *gymnasium.registry])
    near = suggest(name, known)
    if home := module_that_registers(name):
        raise ConfigError(
            f"no environment is named {name!r} until the package that registers it is imported; name its module too: "
            f"{home}:{name}"
        )
    raise ConfigError(
        f"no environment is named {name!r}.{near} If a package registers it when imported, name its module too, as in "
        f"MODULE:{name}. `qfleet envs` lists all others."
    )


def _check(holds: bool, name: str, what: str, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"environment {name}: {what} must be {rule}, got {value}")


def _check_spec(spec: Any, name: str) -> None:
    """Checks the spec, which both kinds of environment have."""
    from qfleet.core.types import EnvSpec

    _check(isinstance(spec, EnvSpec), name, "its spec", "an EnvSpec", type(spec).__name__)
    shape, dtype = spec.observation_shape, spec.observation_dtype
    is_shape = isinstance(shape, tuple) and all(map(_is_count, shape))
    _check(is_shape, name, "observation_shape", "a tuple of whole numbers", shape)
    is_dtype = isinstance(dtype, np.dtype) and dtype.kind in "biuf" and dtype.itemsize <= 4
    rule = "a NumPy dtype of bool or of numbers of at most 32 bits, such as np.dtype('float32')"
    _check(is_dtype, name, "observation_dtype", rule, repr(dtype))
    for name_of_count in ("num_actions", "frame_stack"):
        count = getattr(spec, name_of_count)
        _check(_is_count(count), name, name_of_count, "a whole number, at least 1", count)
    pixel = spec.pixel_limit
    is_limit = pixel is None or (isinstance(pixel, int | float) and 0 < pixel < math.inf)
    _check(is_limit, name, "pixel_limit", "a positive, finite number or None", pixel)
    limit = spec.time_limit
    _check(limit is None or _is_count(limit), name, "time_limit", "a whole number, at least 1, or None", limit)


def _check_in_graph(env: "InGraphEnv", name: str) -> None:
    """Checks the results of the functions of an environment in JAX."""
    import jax

    from qfleet.envs.spec import StepResult

    def trace(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except RAISED_BY_USERS as error:
            raise ConfigError(f"environment {name}: {what} must be traceable by JAX, got {short(error)}") from error

    def check_like(what: str, tree: Any, expected: str) -> None:
        _check(_describe(tree) == expected, name, what, expected, _describe(tree))

    spec = env.spec
    is_right = env.action_mask is not None or not spec.has_action_mask
    _check(is_right, name, "has_action_mask", "left out, or given with an `action_mask` of the InGraphEnv", "it alone")
    shape, dtype = spec.observation_shape, spec.observation_dtype
    key = jax.eval_shape(jax.random.key, 0)
    action = jax.ShapeDtypeStruct((), np.int32)
    observation = f"{dtype}{list(shape)}"
    begun = trace("reset(key)", env.reset, key)
    is_pair = isinstance(begun, tuple) and len(begun) == 2
    _check(is_pair, name, "what reset returns", "(state, observation)", _describe(begun))
    check_like("the observation of reset", begun[1], observation)
    result = trace("step(state, action, key)", env.step, begun[0], action, key)
    _check(isinstance(result, StepResult), name, "what step returns", "a StepResult", _describe(result))
    check_like("the observation of step", result.observation, observation)
    check_like("the reward", result.reward, "float32[]")
    check_like("terminated", result.terminated, "bool[]")
    check_like("truncated", result.truncated, "bool[]")
    check_like("the state after step", result.state, _describe(begun[0]))
    if env.action_mask is not None:
        mask = trace("action_mask(state)", env.action_mask, begun[0])
        check_like("the action mask", mask, f"bool[{spec.num_actions}]")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _describe(tree: Any) -> str:
    """Returns the structure of a pytree, with the dtype and shape of each leaf. Like trees have equal descriptions."""
    import jax

    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))
