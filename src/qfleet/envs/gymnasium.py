"""Environments of Gymnasium, and whatever else is registered with it."""

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
    """What is registered, made with which options, and how the agent sees it."""

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

    Observations must be a Box (64-bit numbers become float32, all others stay) or Discrete (one-hot), actions
    Discrete. An action mask in `info` isn't looked at. The time limit is Gymnasium's `max_episode_steps`.

    Lanes are the environment's own vector version where it has one that can make the rows of `HostStep` exactly, else
    single environments in this process; with `LaneOptions.num_env_workers`, single environments in worker processes.

    Args:
      name: the id, such as `LunarLander-v3`; with `MODULE:` before it, once that module is imported.
      options: arguments of the environment's constructor.

    Raises:
      ConfigError: if there is no such id, it can't be made, or its spaces are others.
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
    """Returns what Gymnasium has registered under an id, after importing the module before a colon.

    Raises:
      ConfigError: if there is none, or the module can't be imported.
    """
    _, local_name = import_module_of(name)
    try:
        return gymnasium.spec(local_name)
    except gymnasium.error.Error as error:
        near = suggest(local_name, gymnasium.registry)
        raise ConfigError(f"Gymnasium has no environment {local_name!r}.{near}") from error


def _make_one(name: str, registered: GymnasiumSpec, options: dict[str, Any]) -> Any:
    """Returns one environment to ask for its spaces, single if there is such a version."""
    try:
        if registered.entry_point is None:
            return _make_vector(registered, options, 1)
        return make_single(registered, options)
    except gymnasium.error.DependencyNotInstalled as error:
        box2d = "pip install 'qfleet[box2d]'" if "box2d" in str(error).lower() else "install that"
        raise ConfigError(f"gym:{name} needs a package that is missing ({error}); {box2d}") from error
    except Exception as error:  # whatever its constructor raises is what is wrong with it
        raise ConfigError(
            f"gym:{name} must be one that gymnasium.make can make, got {type(error).__name__}: {error}"
        ) from error


def _make_vector(registered: GymnasiumSpec, options: dict[str, Any], num_lanes: int) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(registered, num_lanes, vectorization_mode="vector_entry_point", **options)


def _time_limit(registered: GymnasiumSpec, options: dict[str, Any]) -> int | None:
    given: int | None = options.get("max_episode_steps")
    limit = registered.max_episode_steps if given is None else given
    return None if limit == -1 else limit  # as gymnasium.make takes it


def _is_vector(env: Any) -> bool:
    return isinstance(env, gymnasium.vector.VectorEnv)


def _use_vector(name: str, registered: GymnasiumSpec, options: dict[str, Any]) -> bool:
    """Returns whether the environment's own vector version is the one to use.

    Raises:
      ConfigError: if it is the only one, and doesn't tell its autoreset mode.
    """
    if registered.vector_entry_point is None or registered.additional_wrappers:
        return False
    must = registered.entry_point is None
    try:
        env = _make_vector(registered, options, 1)
    except Exception as error:
        if must:
            raise ConfigError(f"gym:{name} has no version that can be made: {type(error).__name__}: {error}") from error
        return False  # it takes other arguments than the single version, which works
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
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # or pygame greets on stdout
    single = kind.single(render_mode="rgb_array")
    try:
        with contextlib.closing(single.make()) as env:
            env.reset(seed=0)
            env.render()  # only now do some import what they draw with
    except Exception as error:  # whatever it raises is why it can't be watched
        raise ConfigError(
            f"{kind.spec.name} must render to be watched, got {type(error).__name__}: {error}; install what it names"
        ) from error
    return SingleLanes(single, 1, lane_options)
