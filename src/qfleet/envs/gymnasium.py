"""Environments that are registered with Gymnasium, by itself or by others."""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec as GymnasiumSpec
from gymnasium.vector import AutoresetMode

from qfleet.config.errors import ConfigError, suggest
from qfleet.envs.host import EnvSpec, HostEnv, HostLanes, LaneOptions, RenderedLanes
from qfleet.envs.lane_group import SingleEnv, make_single
from qfleet.envs.names import import_module_of
from qfleet.envs.observations import Encoder, discrete_actions, make_encoder
from qfleet.envs.single_lanes import SingleLanes
from qfleet.envs.vector_lanes import GymnasiumVector, VectorLanes
from qfleet.envs.worker_lanes import WorkerLanes


class _Kind(NamedTuple):
    """A registered environment with its options and its encoding for the agent."""

    spec: EnvSpec
    registered: GymnasiumSpec
    options: dict[str, Any]
    encoder: Encoder
    first_action: int

    def single(self, **further_options: Any) -> SingleEnv:
        make = functools.partial(make_single, self.registered, {**self.options, **further_options})
        return SingleEnv(self.spec.name, make, self.encoder, self.first_action)


def make(name: str, **options: Any) -> HostEnv:
    """Returns the environment that is registered with Gymnasium under that id.

    Observations must be a Box or Discrete, actions Discrete. `make_encoder` says how observations are encoded. Action
    masks in `info` are ignored. The time limit is Gymnasium's `max_episode_steps`.

    With `LaneOptions.num_env_workers`, lanes are single environments in worker processes. Without, they are the
    environment's own vector version if it has one that yields exactly the rows of `HostStep`, and single environments
    in this process if it doesn't.

    Args:
      name: the id, such as `LunarLander-v3`. With `MODULE:` before it, that module is imported first.
      **options: arguments of the environment's constructor.

    Raises:
      ConfigError: if there is no such id, the environment can't be made, or it has other spaces.
    """
    registered = find(name)
    env = _make_one(name, registered, options)
    try:
        encoder = make_encoder(env.single_observation_space if _is_vector(env) else env.observation_space, name)
        actions = discrete_actions(env.single_action_space if _is_vector(env) else env.action_space, name)
    finally:
        env.close()
    spec = EnvSpec(
        name=f"gym:{name}",
        observation_shape=encoder.shape,
        observation_dtype=encoder.dtype,
        num_actions=int(actions.n),
        time_limit=_time_limit(registered, options),
    )
    kind = _Kind(spec, registered, options, encoder, int(actions.start))
    lanes = functools.partial(_make_lanes, kind, _use_vector(name, registered, options))
    can_render = not _is_vector(env) and "rgb_array" in env.metadata.get("render_modes", ())
    return HostEnv(spec, lanes, lanes, functools.partial(_make_rendered_lanes, kind) if can_render else None)


def find(name: str) -> GymnasiumSpec:
    """Returns Gymnasium's registration of an id, after importing the module before the colon, if any.

    Raises:
      ConfigError: if the id isn't registered, or the module can't be imported.
    """
    _, local_name = import_module_of(name)
    try:
        return gymnasium.spec(local_name)
    except gymnasium.error.Error as error:
        near = suggest(local_name, gymnasium.registry)
        raise ConfigError(f"Gymnasium has no environment {local_name!r}.{near}") from error


def _make_one(name: str, registered: GymnasiumSpec, options: dict[str, Any]) -> Any:
    """Returns one environment, from which to read the spaces. It is a single one if there is a single version."""
    try:
        if registered.entry_point is None:
            return _make_vector(registered, options, 1)
        return make_single(registered, options)
    except gymnasium.error.DependencyNotInstalled as error:
        box2d = "pip install 'qfleet[box2d]'" if "box2d" in str(error).lower() else "install that"
        raise ConfigError(f"gym:{name} needs a package that is missing ({error}); {box2d}") from error
    except Exception as error:  # a constructor may raise anything
        raise ConfigError(
            f"gym:{name} must be one that gymnasium.make can make, got {type(error).__name__}: {error}"
        ) from error


def _make_vector(registered: GymnasiumSpec, options: dict[str, Any], num_lanes: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(registered, num_lanes, vectorization_mode="vector_entry_point", **options)


def _time_limit(registered: GymnasiumSpec, options: dict[str, Any]) -> int | None:
    given: int | None = options.get("max_episode_steps")
    limit = registered.max_episode_steps if given is None else given
    return None if limit == -1 else limit  # to gymnasium.make, too, -1 means no limit


def _is_vector(env: Any) -> bool:
    return isinstance(env, gymnasium.vector.VectorEnv)


def _use_vector(name: str, registered: GymnasiumSpec, options: dict[str, Any]) -> bool:
    """Returns whether to use the environment's own vector version.

    Raises:
      ConfigError: if it has no other version, and this one doesn't declare its autoreset mode.
    """
    if registered.vector_entry_point is None or registered.additional_wrappers:
        return False
    must = registered.entry_point is None
    try:
        env = _make_vector(registered, options, 1)
    except Exception as error:
        if must:
            raise ConfigError(f"gym:{name} has no version that can be made: {type(error).__name__}: {error}") from error
        return False  # it doesn't take the arguments that the single version takes
    env.close()
    mode = env.metadata.get("autoreset_mode")
    if must and not isinstance(mode, AutoresetMode):
        rule = "a vector environment's metadata['autoreset_mode'] must be a gymnasium.vector.AutoresetMode"
        raise ConfigError(f"gym:{name}: {rule}, got {mode!r}")
    return must or mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED)


def _make_lanes(kind: _Kind, use_vector: bool, num_lanes: int, lane_options: LaneOptions) -> HostLanes:
    if lane_options.num_env_workers and kind.registered.entry_point is None:
        raise ConfigError(f"num_env_workers must be 0 for {kind.spec.name}, of which there are no single environments")
    if use_vector and not lane_options.num_env_workers:

        def make_backend(num_lanes: int) -> GymnasiumVector:
            env = _make_vector(kind.registered, kind.options, num_lanes)
            return GymnasiumVector(env, kind.encoder, kind.first_action)

        return VectorLanes(kind.spec.name, make_backend, num_lanes, lane_options)
    lanes = WorkerLanes if lane_options.num_env_workers else SingleLanes
    return lanes(kind.single(), num_lanes, lane_options)


def _make_rendered_lanes(kind: _Kind, lane_options: LaneOptions) -> RenderedLanes:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # keeps pygame from printing a greeting
    single = kind.single(render_mode="rgb_array")
    try:
        with contextlib.closing(single.make()) as env:
            env.reset(seed=0)
            env.render()  # some environments import their drawing library only here
    except Exception as error:  # a renderer may raise anything
        raise ConfigError(
            f"{kind.spec.name} must render to be watched, got {type(error).__name__}: {error}; "
            f"install the package that this error names"
        ) from error
    return SingleLanes(single, 1, lane_options)
