"""Environments that are registered with Gymnasium, by itself or by others."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.registration import EnvSpec as GymnasiumSpec
from gymnasium.vector import AutoresetMode

from qfleet.config.errors import RAISED_BY_USERS, ConfigError, short, suggest
from qfleet.envs.action_masks import find_mask
from qfleet.envs.actions import Actions, make_actions
from qfleet.envs.failures import describe
from qfleet.envs.host import EnvSpec, HostEnv, HostLanes, LaneOptions, RenderedLanes
from qfleet.envs.lane_group import MakeNew, SingleEnv, make_single
from qfleet.envs.names import import_module_of
from qfleet.envs.observations import Encoder, make_encoder
from qfleet.envs.rendering import is_picture
from qfleet.envs.single_lanes import SingleLanes
from qfleet.envs.vector_lanes import GymnasiumVector, VectorLanes
from qfleet.envs.worker_lanes import WorkerLanes

_RENDER = "let its render() return an RGB picture, and add 'rgb_array' to its metadata['render_modes']"


class _Kind(NamedTuple):
    """A kind of environment: how one is made, and its encoding for the agent."""

    spec: EnvSpec
    make: Callable[..., gymnasium.Env]
    encoder: Encoder
    actions: Actions

    def single(self, **options: Any) -> SingleEnv:
        return SingleEnv(self.spec.name, functools.partial(self.make, **options), self.encoder, self.actions)


def make(name: str, /, **options: Any) -> HostEnv:
    """Returns the environment that is registered with Gymnasium under that id.

    `make_encoder` says which observations it may have and how they are encoded, and `make_actions` which actions. The
    time limit is Gymnasium's `max_episode_steps`.

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
    make_one = functools.partial(make_single, registered, options)
    kind = _describe(env, f"gym:{name}", make_one, _time_limit(registered, options))
    use_vector = functools.cache(functools.partial(_use_vector, kind.spec.name, registered, options))
    lanes = functools.partial(_make_lanes, kind, registered, options, use_vector)
    can_render = not _is_vector(env) and _can_draw(env)
    return _host_env(kind, lanes, {"render_mode": "rgb_array"} if can_render else None)


def from_maker(name: str, make: Callable[..., gymnasium.Env], options: dict[str, Any], env: gymnasium.Env) -> HostEnv:
    """Returns an environment whose lanes are what a user's function returns.

    Args:
      name: name of the environment in errors.
      make: returns a new environment each time it is called. If it takes `render_mode`, it is called with "rgb_array"
        for videos.
      options: keyword arguments of `make`.
      env: one environment that `make` has returned. It is closed.

    Raises:
      ConfigError: if the environment has spaces that can't be learned in, or `make` returns the same object each time.
    """
    make_new = MakeNew(name, functools.partial(make, **options), env)
    kind = _describe(env, name, make_new, _limit_of(env))
    takes_mode = "render_mode" in _parameters(make)
    if takes_mode and _can_draw(env):
        render_options: dict[str, Any] | None = {"render_mode": "rgb_array"}
    else:
        render_options = {} if env.render_mode == "rgb_array" else None
    remedy = "let the function that makes it take render_mode, and hand that on" if _can_draw(env) else _RENDER
    return _host_env(kind, functools.partial(_make_single_lanes, kind), render_options, remedy)


def _can_draw(env: Any) -> bool:
    """Returns whether an environment says that it can render RGB pictures."""
    return "rgb_array" in ((env.metadata or {}).get("render_modes") or ())


def _describe(env: Any, name: str, make_one: Callable[..., gymnasium.Env], time_limit: int | None) -> _Kind:
    """Returns the kind of an environment, from an instance, which it closes."""
    prefix = "single_" if _is_vector(env) else ""
    try:
        space = _space_of(env, f"{prefix}observation_space", name)
        actions = make_actions(_space_of(env, f"{prefix}action_space", name), name)
        encoder = make_encoder(space, name, find_mask(env, space, actions, name))
    finally:
        with contextlib.suppress(*RAISED_BY_USERS):  # a broken environment may fail to close too
            env.close()
    spec = EnvSpec(
        name=name,
        observation_shape=encoder.shape,
        observation_dtype=encoder.dtype,
        num_actions=actions.num_actions,
        time_limit=time_limit,
        pixel_limit=encoder.pixel_limit,
        has_action_mask=encoder.mask is not None,
    )
    return _Kind(spec, make_one, encoder, actions)


def _space_of(env: Any, attribute: str, name: str) -> gymnasium.Space:
    try:
        space = getattr(env, attribute, None)
    except RAISED_BY_USERS as error:  # of a property of the user's
        raise ConfigError(f"environment {name}: its {attribute} must be there, got {describe(error)}") from error
    if not isinstance(space, gymnasium.Space):
        raise ConfigError(
            f"environment {name}: its {attribute} must be one of gymnasium.spaces, got {space!r}; set it in __init__"
        )
    return space


def _host_env(
    kind: _Kind, lanes: Callable[..., HostLanes], render_options: dict[str, Any] | None, remedy: str = _RENDER
) -> HostEnv:
    """Returns the environment.

    Args:
      kind: kind of the environment.
      lanes: makes lanes for training and evaluation.
      render_options: options with which an environment renders. None if it can't.
      remedy: what the user can do if it can't.
    """
    rendered: Callable[[LaneOptions], RenderedLanes] | None = None
    if render_options is not None:
        rendered = functools.partial(_make_rendered_lanes, kind, render_options)
    elif not is_picture(kind.spec):
        rendered = functools.partial(_refuse_to_render, kind.spec, remedy)
    return HostEnv(kind.spec, lanes, lanes, rendered, kind.encoder, kind.actions)


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
    except RAISED_BY_USERS as error:  # a constructor may raise anything
        raise ConfigError(f"gym:{name} must be one that gymnasium.make can make, got {describe(error)}") from error


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
    except RAISED_BY_USERS as error:
        if must:
            raise ConfigError(f"{name} has no version that can be made: {short(error)}") from error
        return False  # it doesn't take the arguments that the single version takes
    with contextlib.suppress(*RAISED_BY_USERS):  # it may fail to close, but it has been made
        env.close()
    mode = env.metadata.get("autoreset_mode")
    if must and not isinstance(mode, AutoresetMode):
        rule = "a vector environment's metadata['autoreset_mode'] must be a gymnasium.vector.AutoresetMode"
        raise ConfigError(f"{name}: {rule}, got {mode!r}")
    return must or mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED)


def _limit_of(env: gymnasium.Env) -> int | None:
    """Returns the time limit that wrappers impose on an environment, or None."""
    limits = []
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            limits.append(int(env._max_episode_steps))
        env = env.env
    return min(limits, default=None)


def _parameters(make: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return ()


def _make_lanes(
    kind: _Kind,
    registered: GymnasiumSpec,
    options: dict[str, Any],
    use_vector: Callable[[], bool],
    num_lanes: int,
    lane_options: LaneOptions,
) -> HostLanes:
    if lane_options.num_env_workers and registered.entry_point is None:
        raise ConfigError(f"num_env_workers must be 0 for {kind.spec.name}, of which there are no single environments")
    if not lane_options.num_env_workers and use_vector():

        def make_backend(num_lanes: int) -> GymnasiumVector:
            return GymnasiumVector(_make_vector(registered, options, num_lanes), kind.encoder, kind.actions)

        return VectorLanes(kind.spec.name, make_backend, num_lanes, lane_options)
    return _make_single_lanes(kind, num_lanes, lane_options)


def _make_single_lanes(kind: _Kind, num_lanes: int, lane_options: LaneOptions) -> HostLanes:
    lanes = WorkerLanes if lane_options.num_env_workers else SingleLanes
    return lanes(kind.single(), num_lanes, lane_options)


def _refuse_to_render(spec: EnvSpec, remedy: str, lane_options: LaneOptions) -> RenderedLanes:
    raise ConfigError(f"{spec.name} must have the render mode 'rgb_array' to be watched, and it hasn't; {remedy}")


def _make_rendered_lanes(kind: _Kind, options: dict[str, Any], lane_options: LaneOptions) -> RenderedLanes:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # keeps pygame from printing a greeting
    single = kind.single(**options)
    try:
        with contextlib.closing(single.make()) as env:
            env.reset(seed=0)
            env.render()  # some environments import their drawing library only here
    except RAISED_BY_USERS as error:  # a renderer may raise anything
        raise ConfigError(
            f"{kind.spec.name} must render to be watched, got {short(error)}; install the package that this error names"
        ) from error
    return SingleLanes(single, 1, lane_options)
