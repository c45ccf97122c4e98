"""Greedy evaluation: whole episodes, apart from training."""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core import exploration
from qfleet.core.frame_stack import init_view, push_frame
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import EnvSpec, Params, identity
from qfleet.envs.host import HostLanes
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime import peers
from qfleet.runtime.host_acting import HostActing

logger = logging.getLogger("qfleet")

MAX_LOST = 3
"""Number of episodes that an evaluation may lose to failures, per episode that it asks for."""

MAX_EPISODE_STEPS = 27_000
"""Length at which an episode is cut if its environment has no time limit: half an hour of Atari at 60 frames/s."""


class Episodes(NamedTuple):
    """Greedy episodes under way inside a compiled program, `[episodes, ...]`, or a replica's share of them."""

    time: Array
    """`[]` int32, steps so far."""
    key: Array
    """`[]`, random key of all steps."""
    env_state: Any
    view: Array
    has_ended: Array
    returns: Array
    """float32, undiscounted, so far."""


def divide_episodes(over_lanes: Any, whole: Any) -> Any:
    """Returns what divides `Episodes` over replicas: `over_lanes` for what there is of each episode, or `whole`."""
    return Episodes(whole, whole, over_lanes, over_lanes, over_lanes, over_lanes)


def begin_episodes(
    env: InGraphEnv,
    key: Array,
    num_episodes: int,
    to_storage_layout: Callable[[Array], Array] = identity,
    replicas: Replicas = ALONE,
) -> Episodes:
    """Returns episodes at their first step. The arguments are those of `greedy_returns`."""
    num_own = -(-num_episodes // replicas.size)
    reset_key, step_key = jax.random.split(key)
    env_state, obs = jax.vmap(env.reset)(_keys_of(reset_key, num_own, replicas))
    view = init_view(to_storage_layout(obs), env.spec.frame_stack)
    return Episodes(jnp.int32(0), step_key, env_state, view, jnp.zeros(num_own, bool), jnp.zeros(num_own))


def play_on(
    env: InGraphEnv,
    q_values: Callable[[Params, Array], Array],
    params: Params,
    episodes: Episodes,
    until: Array | int,
    to_storage_layout: Callable[[Array], Array] = identity,
    replicas: Replicas = ALONE,
) -> Episodes:
    """Returns the episodes `until` steps after their beginning, or earlier if all have ended. All are stepped at once.

    The arguments are those of `greedy_returns`.
    """
    nobody = jnp.zeros(len(episodes.returns), bool)

    def step(episodes: Episodes) -> Episodes:
        time, key, env_state, view, has_ended, returns = episodes
        action = exploration.greedy(q_values(params, view))
        keys = _keys_of(jax.random.fold_in(key, time), len(returns), replicas)
        result = jax.vmap(env.step)(env_state, action, keys)
        returns += jnp.where(has_ended, 0.0, result.reward)
        has_ended |= result.terminated | result.truncated
        view = push_frame(view, to_storage_layout(result.observation), nobody, env.spec.frame_stack)
        return Episodes(time + 1, key, result.state, view, has_ended, returns)

    return jax.lax.while_loop(lambda each: (each.time < until) & ~are_over(env, each), step, episodes)


def are_over(env: InGraphEnv, episodes: Episodes) -> Array:
    """Returns whether all episodes have ended or come to the limit of steps, `[]` bool."""
    return (episodes.time >= (env.spec.time_limit or MAX_EPISODE_STEPS)) | jnp.all(episodes.has_ended)


def greedy_returns(
    env: InGraphEnv,
    q_values: Callable[[Params, Array], Array],
    params: Params,
    key: Array,
    num_episodes: int,
    to_storage_layout: Callable[[Array], Array] = identity,
) -> Array:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32.

    Args:
      q_values: `q_values(params, obs) -> q`, for a batch of observations.
      key: random key of these episodes. Training must not have used it.
      num_episodes: number of episodes, over all replicas.
      to_storage_layout: converts observations to the layout that `q_values` takes; `Network.to_storage_layout`.
    """
    episodes = begin_episodes(env, key, num_episodes, to_storage_layout)
    limit = np.iinfo(np.int32).max
    return play_on(env, q_values, params, episodes, limit, to_storage_layout).returns


def _keys_of(key: Array, count: int, replicas: Replicas) -> Array:
    """Returns the random keys of a replica's `count` episodes."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, local_lane_ids(replicas, count))


PIECE_SECONDS = 0.5
"""Target time of a piece of an evaluation. A request to stop is heard between two pieces."""

_LONGEST_PIECE = 2**20  # steps


class InPieces:
    """Greedy episodes of compiled programs, played in pieces of so many steps, so that they can be left half-way."""

    def __init__(self, begin: Callable[..., Episodes], play: Callable[..., tuple[Episodes, Array, Array]]) -> None:
        """Plays nothing yet.

        Args:
          begin: `begin(*arguments) -> episodes`, compiled.
          play: `play(params, episodes, until) -> episodes, returns, are_over`, compiled.
        """
        self._begin, self._play = begin, play
        self._length = 128  # steps of a piece, a guess

    def returns(self, params: Params, arguments: tuple[Any, ...], check: Callable[[], None]) -> np.ndarray:
        """Returns the returns of whole episodes, which begin with `arguments`; calls `check` before each piece."""
        episodes, until, has_ended = self._begin(*arguments), 0, False
        while not has_ended:
            check()
            until += self._length
            started = time.perf_counter()
            episodes, returns, over = self._play(params, episodes, np.int32(until))
            has_ended = bool(np.all(over))
            seconds = peers.firsts(time.perf_counter() - started)
            if seconds < PIECE_SECONDS / 2:
                self._length = min(2 * self._length, _LONGEST_PIECE)
            elif seconds > 2 * PIECE_SECONDS:
                self._length = max(1, self._length // 2)
        return np.asarray(returns)


def host_greedy_returns(
    lanes: HostLanes,
    spec: EnvSpec,
    act: Callable[[Array], Array],
    num_episodes: int,
    seed: int,
    to_storage_layout: Callable[[Array], Array] = identity,
) -> np.ndarray:
    """Returns the undiscounted returns of greedy episodes, `[num_episodes]` float32.

    It counts the episodes that start first, leaving out those whose environment fails. Counting the episodes that end
    first would favour short ones. Replaying an episode that failed might never end, because the environment may always
    fail at the same place.

    If failures take more than `MAX_LOST` times as many episodes as are asked for, the evaluation logs a warning and
    returns the whole episodes that it has by then, which may be none: an environment that fails every 1,000 steps never
    completes an episode of 1,000 steps.

    Args:
      lanes: at least one lane; all are reset.
      spec: the spec of the lanes' environment.
      act: `act(view) -> action`, from `[lanes, ...]` stacks of stored frames to `[lanes]`.
      num_episodes: how many returns to collect, over all lanes.
      seed: seed of these episodes; it must differ from every seed of training.
      to_storage_layout: converts observations to what `act` expects, as `Network.to_storage_layout` does.
    """
    limit = spec.time_limit or MAX_EPISODE_STEPS
    push = jax.jit(lambda view, obs, is_first: push_frame(view, to_storage_layout(obs), is_first, spec.frame_stack))
    acting = HostActing(lanes, seed, max_episode_steps=limit)
    view = init_view(to_storage_layout(jnp.asarray(acting.obs)), spec.frame_stack)
    under_way = np.arange(len(view))  # the episode of each lane, numbered in the order in which they start
    returns: dict[int, float] = {}
    num_lost = 0
    while len(returns) < num_episodes or sorted(returns)[num_episodes - 1] > np.min(under_way):
        acting.send(np.asarray(act(view), np.int32))
        row = acting.receive()
        returns |= zip(under_way[row.episode_ended].tolist(), row.returns, strict=True)
        is_next = row.episode_ended | row.failed
        under_way[is_next] = np.max(under_way) + 1 + np.arange(np.sum(is_next))
        view = push(view, acting.obs, acting.is_first)
        num_lost += row.num_failures
        if num_lost > MAX_LOST * num_episodes:
            logger.warning(
                "an evaluation lost %d episodes to environments that failed, and was given up with %d whole ones of %d",
                num_lost,
                min(len(returns), num_episodes),
                num_episodes,
            )
            break
    return np.array([returns[number] for number in sorted(returns)[:num_episodes]], np.float32)
