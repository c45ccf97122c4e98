"""Names of environments: ours, gymnax's, and those that users register.

Nothing here imports JAX until an environment is made, so that the command line can list names at once.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qfleet.config import ConfigError, suggest

if TYPE_CHECKING:
    from qfleet.envs.spec import InGraphEnv

_OURS = {
    "CartPole-v1": "qfleet.envs.cartpole",
    "Acrobot-v1": "qfleet.envs.acrobot",
    "MountainCar-v0": "qfleet.envs.mountain_car",
}
_MINATAR = ("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar")

_PREFIXES = ("gymnax", "gym", "ale", "envpool")
"""What may stand before a colon beside a module's name: where the environment comes from."""

_registered: dict[str, Callable[[], "InGraphEnv"]] = {}


def register_env(name: str, make: Callable[[], "InGraphEnv"]) -> None:
    """Gives an environment a name; `make_env(name)` calls `make` and checks what it returns.

    Registering a name again replaces it, so that a notebook cell may run twice.

    Raises:
      ConfigError: if the name is empty, holds a colon (which separates a module from a name) or is one of ours.
    """
    if not name or ":" in name or name in _OURS:
        other = "My" + name.replace(":", "-")
        raise ConfigError(f"an environment's name must be new and hold no colon, got {name!r}; try {other!r}")
    _registered[name] = make


def list_envs() -> list[tuple[str, str]]:
    """Returns `(name, what it is)` of every environment that can be named without importing anything."""
    return [
        *((name, "built in, in JAX") for name in _OURS),
        *((name, "registered by this program") for name in _registered),
        *((f"gymnax:{name}", "gymnax, in JAX (extra 'gymnax')") for name in _MINATAR),
        ("gymnax:NAME", "any other environment of gymnax with discrete actions"),
        ("MODULE:NAME", "yours: the Python module MODULE calls qfleet.register_env(NAME, make) when imported"),
    ]


def make_env(name: str) -> "InGraphEnv":
    """Returns the environment of that name, in any of the forms that `list_envs` gives.

    Raises:
      ConfigError: if there is none, its module can't be imported, or a registered one breaks the contract.
    """
    if name in _OURS:
        return importlib.import_module(_OURS[name]).make()
    prefix, separator, local_name = name.rpartition(":")
    if prefix == "gymnax":
        from qfleet.envs import gymnax

        return gymnax.make(local_name)
    if separator:
        _import(prefix)
    if local_name not in _registered:
        if prefix:
            rule = f"module {prefix} must register {local_name!r} with qfleet.register_env when imported"
            raise ConfigError(f"{rule}, it registered no such name.{suggest(local_name, _registered)}")
        known = [*_OURS, *_registered, *(f"gymnax:{minatar}" for minatar in _MINATAR)]
        raise ConfigError(f"no environment is named {name!r}.{suggest(name, known)} `qfleet envs` lists them all.")
    env = _registered[local_name]()
    check_env(env, name)
    return env


def default_topology(name: str) -> str:
    """Returns the name of the topology that suits an environment: `fused` for those written in JAX.

    It makes registered environments, to see what they are; others are known by their names.
    """
    prefix, separator, local_name = name.rpartition(":")
    if separator and prefix not in _PREFIXES:
        _import(prefix)
    is_registered = local_name in _registered and prefix not in _PREFIXES
    if name in _OURS or prefix == "gymnax" or (is_registered and _is_in_graph(_registered[local_name]())):
        return "fused"
    return "overlapped"


def check_env(env: "InGraphEnv", name: str) -> None:
    """Raises ConfigError if an environment breaks the contract of `InGraphEnv`; traces it, runs nothing."""
    import jax

    from qfleet.envs.spec import InGraphEnv, StepResult

    def check(holds: bool, what: str, rule: str, value: Any) -> None:
        if not holds:
            raise ConfigError(f"environment {name}: {what} must be {rule}, got {value}")

    def trace(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except Exception as error:
            raise ConfigError(
                f"environment {name}: {what} must be traceable by JAX, got {type(error).__name__}: {error}"
            ) from error

    def check_like(what: str, tree: Any, expected: str) -> None:
        check(_describe(tree) == expected, what, expected, _describe(tree))

    check(isinstance(env, InGraphEnv), "what its make() returns", "an InGraphEnv", type(env).__name__)
    spec = env.spec
    shape, dtype = spec.observation_shape, spec.observation_dtype
    is_shape = isinstance(shape, tuple) and all(map(_is_count, shape))
    check(is_shape, "observation_shape", "a tuple of whole numbers", shape)
    is_dtype = isinstance(dtype, np.dtype) and dtype.kind in "biuf"
    check(is_dtype, "observation_dtype", "a NumPy dtype of numbers or bool, such as np.dtype('float32')", repr(dtype))
    for name_of_count in ("num_actions", "frame_stack"):
        count = getattr(spec, name_of_count)
        check(_is_count(count), name_of_count, "a whole number, at least 1", count)
    limit = spec.time_limit
    check(limit is None or _is_count(limit), "time_limit", "a whole number, at least 1, or None", limit)

    key = jax.eval_shape(jax.random.key, 0)
    action = jax.ShapeDtypeStruct((), np.int32)
    observation = f"{dtype}{list(shape)}"
    begun = trace("reset(key)", env.reset, key)
    is_pair = isinstance(begun, tuple) and len(begun) == 2
    check(is_pair, "what reset returns", "(state, observation)", _describe(begun))
    check_like("the observation of reset", begun[1], observation)
    result = trace("step(state, action, key)", env.step, begun[0], action, key)
    check(isinstance(result, StepResult), "what step returns", "a StepResult", _describe(result))
    check_like("the observation of step", result.observation, observation)
    check_like("the reward", result.reward, "float32[]")
    check_like("terminated", result.terminated, "bool[]")
    check_like("truncated", result.truncated, "bool[]")
    check_like("the state after step", result.state, _describe(begun[0]))


def _is_in_graph(env: Any) -> bool:
    from qfleet.envs.host import HostEnv

    return not isinstance(env, HostEnv)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _describe(tree: Any) -> str:
    """Returns a pytree's structure with each leaf as its dtype and shape: two that print alike are alike."""
    import jax

    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises is what is wrong with it
        raise ConfigError(
            f"what stands before the colon must be 'gymnax' or a Python module that can be imported, got {module!r} "
            f"({type(error).__name__}: {error}).{suggest(module, ['gymnax'])}"
        ) from error
