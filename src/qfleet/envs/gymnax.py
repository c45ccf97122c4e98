"""Environments of gymnax (Lange 2022), including MinAtar's. Extra `gymnax`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config.errors import ConfigError
from qfleet.envs.spec import EnvSpec, EnvState, InGraphEnv, StepResult


def make(name: str, /, **options: Any) -> InGraphEnv:
    """Returns gymnax's environment of that name as an `InGraphEnv`.

    MinAtar's observations consist of 0 and 1 and become bool. Discrete observations become one-hot bool, all others
    float32. The time limit is gymnax's `max_steps_in_episode`.

    Args:
      name: name of the environment in gymnax, such as `Breakout-MinAtar`.
      **options: arguments of the environment's constructor, and fields of its parameters, such as `memory_length`.

    Raises:
      ConfigError: if gymnax is too old, or the environment's actions are continuous.
      Exception: anything that the constructor raises. MNISTBandit's reads files that gymnax doesn't ship.
    """
    import gymnax  # only here, because it loads plotting libraries, which takes seconds
    from gymnax.environments import spaces

    env, params = _make(gymnax.make, name, options)
    if not hasattr(env, "is_truncated"):
        raise ConfigError(
            "gymnax must be 1.0 or newer, which keeps time limits apart from termination; pip install 'qfleet[gymnax]'"
        )
    actions, observations = env.action_space(params), env.observation_space(params)
    if not isinstance(actions, spaces.Discrete):
        raise ConfigError(
            f"actions must be discrete, gymnax:{name} has {actions}; choose an environment with discrete actions"
        )
    one_hot = isinstance(observations, spaces.Discrete)
    dtype = np.dtype(bool if one_hot or name.endswith("-MinAtar") else np.float32)

    def observe(observation: jax.Array) -> jax.Array:
        return (jax.nn.one_hot(observation, observations.n) if one_hot else observation).astype(dtype)

    def reset(key: jax.Array) -> tuple[EnvState, jax.Array]:
        # `env.reset` would be compiled separately, and `env.step` resets the environment when an episode ends.
        observation, state = env.reset_env(key, params)
        return state, observe(observation)

    def step(state: EnvState, action: jax.Array, key: jax.Array) -> StepResult:
        observation, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return StepResult(state, observe(observation), jnp.float32(reward), terminated, env.is_truncated(state, params))

    spec = EnvSpec(
        name=f"gymnax:{name}",
        observation_shape=jax.eval_shape(lambda: reset(jax.random.key(0)))[1].shape,
        observation_dtype=dtype,
        num_actions=int(actions.n),
        time_limit=int(params.max_steps_in_episode),
    )
    return InGraphEnv(spec, reset, step)


def names() -> list[str]:
    """Returns the names of gymnax's environments, also of those that have continuous actions."""
    import gymnax

    return list(gymnax.registered_envs)


def _make(make: Callable[..., tuple[Any, Any]], name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Returns an environment of gymnax and its parameters, with those options that are parameters set in these."""
    if not options:
        return make(name)
    fields = {field.name for field in dataclasses.fields(make(name)[1])}
    env, params = make(name, **{key: value for key, value in options.items() if key not in fields})
    changes = {key: value for key, value in options.items() if key in fields}
    for key, value in changes.items():
        kind = type(getattr(params, key))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(
                f"env_options must give {key} of gymnax:{name} as {kind.__name__}, like its default "
                f"{getattr(params, key)}, got {value!r}"
            )
    return env, dataclasses.replace(params, **changes)
