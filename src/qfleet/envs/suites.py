"""Environments of suites written in JAX: gymnax, octax, pgx and xminigrid, each an extra of its name.

Each suite has one function that lists its names and one that adapts an environment. Adapters call those functions of a
suite that don't reset, because a step that starts the next episode by itself loses the final observation.
"""

import pkgutil
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config.errors import ConfigError, suggest
from qfleet.envs import gymnax
from qfleet.envs.failures import describe
from qfleet.envs.spec import EnvSpec, EnvState, InGraphEnv, StepResult, with_masks_joined


class _Suite(NamedTuple):
    """The adapter of one suite."""

    names: Callable[[], list[str]]
    """Returns the names of the suite's environments. Raises ImportError if the suite isn't installed."""
    make: Callable[..., InGraphEnv]
    """`make(name, **options)` returns one of them."""


def make(suite: str, name: str, /, **options: Any) -> InGraphEnv:
    """Returns the environment of that name in a suite. If it has action masks, they are joined with observations.

    Args:
      suite: the part of the name before the colon, such as `octax`.
      name: name of the environment in the suite, such as `pong`.
      **options: options of the environment; `docs/environments.md` lists them for each suite.

    Raises:
      ConfigError: if the suite isn't installed, or has no such environment for one agent, or can't make it.
      TypeError: if the environment doesn't take these options.
    """
    known = names(suite)
    if name not in known:
        raise ConfigError(
            f"{suite} has no environment {name!r} for a single agent; `qfleet envs {suite}` lists those that there "
            f"are.{suggest(name, known)}"
        )
    try:
        return with_masks_joined(_SUITES[suite].make(name, **options))
    except (TypeError, ConfigError):
        raise  # the caller says that it doesn't take these options
    except Exception as error:  # a constructor may raise anything
        raise ConfigError(f"{suite}:{name} must be one that {suite} can make, got {describe(error)}") from error


def names(suite: str) -> list[str]:
    """Returns the names of a suite's environments.

    Raises:
      ConfigError: if the suite isn't installed.
    """
    try:
        return _SUITES[suite].names()
    except ImportError as error:
        raise ConfigError(
            f"environments {suite}:... need the package {suite} ({error}); pip install 'qfleet[{suite}]'"
        ) from error


def _check_count(option: str, value: Any) -> None:
    if not (type(value) is int and value >= 1):
        raise ConfigError(f"{option} must be a whole number, at least 1, got {value!r}")


def _octax_names() -> list[str]:
    """Returns the modules of octax's games. A game with levels has a name for each of them, such as `cavern1`."""
    import octax.environments

    (folder,) = octax.environments.__path__
    roms = [path.stem for path in (Path(folder).parents[1] / "roms").glob("*.ch8")]
    games: list[str] = []
    for module in pkgutil.iter_modules([folder]):
        levels = [rom for rom in roms if re.fullmatch(rf"{module.name}\d+", rom)]
        games += sorted(levels, key=lambda rom: int(rom[len(module.name) :])) or [module.name]
    return games


def _octax(name: str, **options: Any) -> InGraphEnv:
    """Adapts a game of octax. An observation has the frames of one step, oldest first, `[32, 64, frames]` bool."""
    from octax.environments import create_environment

    counts = {"max_num_steps_per_episodes", "frame_skip", "instruction_frequency", "fps"}
    for option in sorted(counts & options.keys()):
        _check_count(option, options[option])
    with _octax_warnings_ignored():
        env, _ = create_environment(name, **options)

    def observe(frames: jax.Array) -> jax.Array:
        return frames.transpose(2, 1, 0)  # from [frames, width, height]

    def reset(key: jax.Array) -> tuple[EnvState, jax.Array]:
        state, frames, _ = env.reset(key)
        return state, observe(frames)

    def step(state: EnvState, action: jax.Array, key: jax.Array) -> StepResult:
        with _octax_warnings_ignored():
            # The game's random numbers come from the key in its state, which `reset` put there.
            state, frames, reward, terminated, truncated, _ = env.step(state, action)
        return StepResult(
            state, observe(frames), jnp.float32(reward), jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        )

    def render(state: EnvState, observation: np.ndarray) -> np.ndarray:
        screen = np.repeat(np.repeat(observation[..., -1], 8, axis=0), 8, axis=1)
        return np.repeat(screen[..., None], 3, axis=-1).astype(np.uint8) * np.uint8(255)

    spec = EnvSpec(
        name=f"octax:{name}",
        observation_shape=(32, 64, env.frame_skip),
        observation_dtype=np.dtype(bool),
        num_actions=env.num_actions,
        time_limit=env.max_num_steps_per_episodes,
    )
    return InGraphEnv(spec, reset, step, render)


def _octax_warnings_ignored() -> warnings.catch_warnings:
    """Returns a context without JAX's warning that octax stores integers in arrays of smaller types."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


def _pgx_names() -> list[str]:
    """Returns pgx's games for one player. All others need an opponent."""
    import pgx

    return [name for name in pgx.available_envs() if name == "2048" or name.startswith("minatar-")]


def _pgx(name: str, *, max_episode_steps: int | None = None, **options: Any) -> InGraphEnv:
    """Adapts a game of pgx. 2048 has action masks: a move must change the board."""
    import pgx

    if max_episode_steps is not None:
        _check_count("max_episode_steps", max_episode_steps)
    env = type(pgx.make(name))(**options)  # `pgx.make` takes no options
    ends_by_time_only = name == "minatar-freeway"

    def reset(key: jax.Array) -> tuple[EnvState, jax.Array]:
        state = env.init(key)
        return state, state.observation

    def step(state: EnvState, action: jax.Array, key: jax.Array) -> StepResult:
        state = env.step(state, action, key)
        terminated, truncated = state.terminated, state.truncated
        if ends_by_time_only:  # pgx calls it terminated
            terminated, truncated = jnp.zeros_like(terminated), terminated | truncated
        return StepResult(state, state.observation, jnp.float32(state.rewards[0]), terminated, truncated)

    first = jax.eval_shape(lambda: reset(jax.random.key(0)))[1]
    spec = EnvSpec(
        name=f"pgx:{name}",
        observation_shape=first.shape,
        observation_dtype=np.dtype(first.dtype),
        num_actions=env.num_actions,
        time_limit=max_episode_steps,
    )
    has_masks = name == "2048"  # in MinAtar's games, all actions are legal
    return InGraphEnv(spec, reset, step, action_mask=(lambda state: state.legal_action_mask) if has_masks else None)


def _xminigrid_names() -> list[str]:
    """Returns xminigrid's ports of MiniGrid. Its XLand tasks come from benchmark files, which must be downloaded."""
    import xminigrid

    return [name for name in xminigrid.registration.registered_environments() if name.startswith("MiniGrid-")]


def _xminigrid(name: str, **options: Any) -> InGraphEnv:
    """Adapts a task of xminigrid. An observation is the agent's view: the tile and the colour of each cell, one-hot.

    Its shape is `[view_size, view_size, tiles + colours]`. The agent stands at the bottom and looks up.
    """
    import xminigrid
    from xminigrid.core.constants import NUM_COLORS, NUM_TILES

    for option in sorted({"max_steps", "view_size"} & options.keys()):
        _check_count(option, options[option])
    env: Any
    params: Any
    env, params = xminigrid.registration.make(name, **options)

    def observe(cells: jax.Array) -> jax.Array:
        one_hot = (jax.nn.one_hot(cells[..., i], n, dtype=bool) for i, n in enumerate((NUM_TILES, NUM_COLORS)))
        return jnp.concatenate([*one_hot], axis=-1)

    def reset(key: jax.Array) -> tuple[EnvState, jax.Array]:
        state = env.reset(params, key)
        return state, observe(state.observation)

    def step(state: EnvState, action: jax.Array, key: jax.Array) -> StepResult:
        state = env.step(params, state, action)  # nothing is random after `reset`
        terminated = state.discount == 0
        return StepResult(
            state, observe(state.observation), jnp.float32(state.reward), terminated, state.last() & ~terminated
        )

    def render(state: EnvState, observation: np.ndarray) -> np.ndarray:
        picture: np.ndarray = env.render(params, state)
        return picture

    spec = EnvSpec(
        name=f"xminigrid:{name}",
        observation_shape=(params.view_size, params.view_size, NUM_TILES + NUM_COLORS),
        observation_dtype=np.dtype(bool),
        num_actions=env.num_actions(params),
        time_limit=params.max_steps,
    )
    return InGraphEnv(spec, reset, step, render)


_SUITES = {
    "gymnax": _Suite(gymnax.names, gymnax.make),
    "octax": _Suite(_octax_names, _octax),
    "pgx": _Suite(_pgx_names, _pgx),
    "xminigrid": _Suite(_xminigrid_names, _xminigrid),
}
