"""Greedy episodes to watch, played one at a time, moment by moment. Module `evaluation` plays many at once."""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import ConfigError
from qfleet.config.errors import RAISED_BY_USERS
from qfleet.core.keys import Stream, key_of
from qfleet.core.masks import shown, split_lanes
from qfleet.core.memory import MemoryState
from qfleet.core.player import Player
from qfleet.core.types import EnvSpec, Params
from qfleet.envs.failures import describe
from qfleet.envs.host import HostEnv, LaneOptions, RenderedLanes, seed_of
from qfleet.envs.rendering import draw_observation, is_picture
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import MAX_EPISODE_STEPS


class Moment(NamedTuple):
    """One state of an episode: its picture, and what the agent does there."""

    picture: np.ndarray
    """`[height, width, 3]` uint8, RGB."""
    q: np.ndarray
    """`[num_actions]` float32, in units of discounted reward; -inf where an action is invalid."""
    action: int | None
    """The greedy action, which is taken here. None in the last moment of an episode."""
    episode_return: float
    """Undiscounted return so far."""
    episode_steps: int
    """Environment steps so far."""


def play(
    env: InGraphEnv | HostEnv, player: Player, params: Params, num_episodes: int, seed: int
) -> Generator[Iterator[Moment], None, None]:
    """Yields greedy episodes, each as an iterator over its moments. Use up one episode before taking the next.

    The lanes that draw them are closed after the last episode, or when the generator is closed.

    An episode of n steps has n + 1 moments. In an environment written in JAX they begin as those of `greedy_returns`
    do with `key_of(seed, Stream.POLICY)`, the key of `Policy.evaluate`; in others, episode i begins as lane 0 of
    `Policy.evaluate` does with seed + i.

    Raises:
      ConfigError: if there is no way to draw the environment, or what it draws isn't a picture.
      RunFailed: if the environment fails.
    """
    if isinstance(env, InGraphEnv):
        yield from _play_in_graph(env, player, params, num_episodes, seed)
        return
    if env.make_rendered_lanes is None:
        _check_is_picture(
            env.spec,
            'let a Gymnasium environment render: "rgb_array" in its metadata["render_modes"], and a picture from '
            "`render`; give a HostEnv of your own `make_rendered_lanes`",
        )
    # No failure may pass unnoticed, because the episode shown would then be pieced together from two.
    options = LaneOptions(max_failures=0)
    lanes = env.make_rendered_lanes(options) if env.make_rendered_lanes else _Observed(env, options)
    try:
        for episode in range(num_episodes):
            yield _play_host(lanes, env.spec, player, params, seed_of(seed + episode, Stream.POLICY))
    finally:
        lanes.close()


def check_can_play(env: InGraphEnv | HostEnv) -> None:
    """Raises ConfigError if `play` can't show an environment. To find out, it draws the first picture of an episode."""
    q: Any = np.zeros((1, env.spec.num_actions), np.float32)
    indifferent = Player(MemoryState, lambda memory, *further: memory, lambda params, memory: (q, memory, ()))
    try:
        with contextlib.closing(play(env, indifferent, (), 1, 0)) as episodes:
            next(next(episodes))
    except ConfigError:
        raise
    except RAISED_BY_USERS as error:  # a renderer may raise anything
        raise ConfigError(
            f"{env.spec.name} must render for videos, got {describe(error)}; fix its renderer, or do without videos"
        ) from error


def _play_in_graph(
    env: InGraphEnv, player: Player, params: Params, num_episodes: int, seed: int
) -> Iterator[Iterator[Moment]]:
    render = env.render
    if render is None:
        _check_is_picture(env.spec, "give the InGraphEnv a `render`")
    reset_key, step_key = jax.random.split(key_of(seed, Stream.POLICY))

    @jax.jit
    def begin(episode: jax.Array) -> tuple:
        env_state, obs = env.reset(jax.random.fold_in(reset_key, episode))
        return env_state, obs, player.begin(obs[None])

    @jax.jit
    def step(env_state: Any, memory: MemoryState, action: jax.Array, time: jax.Array, episode: jax.Array) -> tuple:
        key = jax.random.fold_in(jax.random.fold_in(step_key, time), episode)
        result = env.step(env_state, action, key)
        return result, player.observe(memory, result.observation[None], jnp.zeros(1, bool))

    def episode_of(episode: int) -> Iterator[Moment]:
        env_state, obs, memory = begin(episode)
        total, ended = 0.0, False
        for time in range(_limit(env.spec) + 1):
            seen = np.asarray(obs)
            picture = render(jax.device_get(env_state), seen) if render else _draw(seen, env.spec)
            q, memory, _ = player.values(params, memory)
            moment = _moment(env.spec, picture, q, ended, total, time)
            yield moment
            if moment.action is None:
                return
            result, memory = step(env_state, memory, moment.action, time, episode)
            env_state, obs = result.state, result.observation
            total, ended = total + float(result.reward), bool(result.terminated | result.truncated)

    yield from map(episode_of, range(num_episodes))


def _play_host(lanes: RenderedLanes, spec: EnvSpec, player: Player, params: Params, seed: int) -> Iterator[Moment]:
    memory, is_first = player.begin(jnp.asarray(lanes.reset(seed))), jnp.zeros(1, bool)
    total, ended = 0.0, False
    for time in range(_limit(spec) + 1):
        q, memory, _ = player.values(params, memory)
        moment = _moment(spec, lanes.render(), q, ended, total, time)
        yield moment
        if moment.action is None:
            return
        lanes.send(np.array([moment.action], np.int32))
        step = lanes.recv()
        memory = player.observe(memory, jnp.asarray(step.observation), is_first)
        total, ended = total + float(step.reward[0]), bool(step.terminated[0] | step.truncated[0])


class _Observed:
    """One evaluation lane whose observations are pictures."""

    def __init__(self, env: HostEnv, options: LaneOptions) -> None:
        self._lanes, self._spec = env.make_eval_lanes(1, options), env.spec
        self.send, self.close = self._lanes.send, self._lanes.close
        self._observation = np.zeros(0)

    def reset(self, seed: int) -> np.ndarray:
        self._observation = self._lanes.reset(seed)
        return self._observation

    def recv(self) -> Any:
        step = self._lanes.recv()
        self._observation = step.observation
        return step

    def render(self) -> np.ndarray:
        return _draw(self._observation[0], self._spec)


def _draw(observation: np.ndarray, spec: EnvSpec) -> np.ndarray:
    return draw_observation(split_lanes(observation, spec)[0])


def _limit(spec: EnvSpec) -> int:
    return min(spec.time_limit or MAX_EPISODE_STEPS, MAX_EPISODE_STEPS)


def _moment(spec: EnvSpec, picture: Any, q: Any, ended: bool, total: float, time: int) -> Moment:
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or 0 in picture.shape:
        raise ConfigError(
            f"a picture of {spec.name} must be a uint8 array [height, width, 3], got {picture.dtype} "
            f"{list(picture.shape)}; fix its renderer"
        )
    values = shown(np.asarray(q)[0])
    action = None if ended or time == _limit(spec) else int(np.argmax(values))
    return Moment(picture, values, action, total, time)


def _check_is_picture(spec: EnvSpec, remedy: str) -> None:
    if not is_picture(spec):
        raise ConfigError(
            f"{spec.name} must have something to draw to be watched, got no renderer, and observations "
            f"{spec.observation_dtype} {list(spec.observation_shape)}, which are not pictures; {remedy}"
        )
