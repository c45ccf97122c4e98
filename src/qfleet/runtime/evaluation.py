"""Evaluation: whole episodes of a greedy policy, apart from training.

With `exploration` above 0 the policy takes a uniformly random action with that probability, as published evaluations of
deterministic games do. There, a strictly greedy policy plays one episode again and again.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.exploration import epsilon_greedy, greedy
from qfleet.core.frame_stack import init_view, push_frame
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import EnvSpec, Params, identity
from qfleet.envs.host import HostLanes
from qfleet.envs.spec import EnvState, InGraphEnv
from qfleet.runtime import peers
from qfleet.runtime.activity import announce
from qfleet.runtime.fingerprint import HostFingerprints, extend_fingerprints
from qfleet.runtime.host_acting import HostActing

logger = logging.getLogger("qfleet")

MAX_LOST = 3
"""Number of episodes that an evaluation may lose to failures, per episode that it asks for."""

MAX_EPISODE_STEPS = 27_000
"""The longest episode where no limit is known: half an hour of Atari at 60 frames/s."""

PIECE_SECONDS = 0.25
"""Longest time that one call of the compiled program should take: a request to stop is heard between two calls."""

FIRST_PIECE_STEPS = 32
"""Environment steps of the first call. Later calls take more, as far as `PIECE_SECONDS` allows."""


def never() -> bool:
    """Returns False: nobody asks to stop."""
    return False


class Episodes(NamedTuple):
    """The episodes of an evaluation. `[episodes]` everywhere, or `[seeds, episodes]`."""

    returns: np.ndarray
    """float32, undiscounted."""
    lengths: np.ndarray
    """int32, in environment steps."""
    fingerprints: np.ndarray
    """uint32, a hash of all observations and rewards of the episode."""
    was_cut: np.ndarray
    """bool: the evaluation's own limit cut the episode short, so that its return is only the part up to there."""

    def num_different(self, earlier: "Episodes | None" = None) -> np.ndarray:
        """Returns the number of different episodes, `[]` or `[seeds]`; not counting those that `earlier` has."""
        seen = self._distinct() if earlier is None else self._distinct() - earlier._distinct()
        return np.vectorize(len, otypes=[int])(seen)

    def _distinct(self) -> np.ndarray:
        """Returns the set of the different episodes of each seed, `[]` or `[seeds]`."""
        shape = self.returns.shape
        parts = [np.reshape(part, (-1, shape[-1])).tolist() for part in self[:3]]
        sets = np.empty(len(parts[0]), object)
        sets[:] = [set(zip(*seed, strict=True)) for seed in zip(*parts, strict=True)]
        return sets.reshape(shape[:-1])


def join_episodes(batches: list[Episodes], num_episodes: int) -> Episodes:
    """Returns the first `num_episodes` of several batches of episodes."""
    return Episodes(*(np.concatenate(parts, axis=-1)[..., :num_episodes] for parts in zip(*batches, strict=True)))


# --- Environments written in JAX: a compiled program, called for a bounded number of steps at a time ---


class EpisodesUnderWay(NamedTuple):
    """Episodes that a compiled program steps together. Leading axis `[episodes]` everywhere."""

    env_state: EnvState
    view: Array
    """What the agent sees: stacks of stored frames."""
    episode_return: Array
    """float32, undiscounted, so far."""
    episode_steps: Array
    """int32, so far."""
    fingerprint: Array
    """uint32, so far."""
    has_ended: Array
    """bool."""


class EpisodeStats(NamedTuple):
    """What the host reads after each call of the program, `[episodes]` over all replicas."""

    episode_return: Array
    episode_steps: Array
    fingerprint: Array
    has_ended: Array


class InGraphEvaluation(NamedTuple):
    """The pure functions of an evaluation. Each replica runs them on its share of the episodes."""

    begin: Callable[[Array, Array], EpisodesUnderWay]
    """`begin(key, first_number) -> episodes`, which are numbered from `first_number`, `[]` uint32."""
    play: Callable[[Params, Array, Array, EpisodesUnderWay, Array, Array], tuple[EpisodesUnderWay, EpisodeStats]]
    """`play(params, key, first_number, episodes, first_step, num_steps)` takes at most `num_steps` further steps of all
    episodes, which have taken `first_step` steps so far. It returns early once all of them have ended."""


def make_evaluation(
    env: InGraphEnv,
    q_values: Callable[[Params, Array], Array],
    num_episodes: int,
    exploration: float = 0.0,
    to_storage_layout: Callable[[Array], Array] = identity,
    replicas: Replicas = ALONE,
) -> InGraphEvaluation:
    """Returns the functions that play `num_episodes` at once. Results don't depend on the lengths of the calls.

    Args:
      env: environment to play.
      q_values: `q_values(params, obs) -> q`, for a batch of observations.
      num_episodes: number of episodes, over all replicas.
      exploration: probability of a uniformly random action.
      to_storage_layout: converts observations to the layout that `q_values` takes; `Network.to_storage_layout`.
      replicas: the replicas among which the episodes are divided.
    """
    frame_stack = env.spec.frame_stack
    num_own = -(-num_episodes // replicas.size)
    nobody: Any = np.zeros(num_own, bool)  # of NumPy, because JAX would compile a program for it here

    def keys_of(key: Array, first_number: Array) -> Array:
        numbers = first_number + local_lane_ids(replicas, num_own)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    def begin(key: Array, first_number: Array) -> EpisodesUnderWay:
        reset_key, _ = jax.random.split(key)
        env_state, obs = jax.vmap(env.reset)(keys_of(reset_key, first_number))
        zeros = jnp.zeros(num_own)
        fingerprint = extend_fingerprints(zeros.astype(jnp.uint32), obs, zeros)
        view = init_view(to_storage_layout(obs), frame_stack)
        return EpisodesUnderWay(env_state, view, zeros, zeros.astype(jnp.int32), fingerprint, jnp.asarray(nobody))

    def act(q: Array, key: Array, first_number: Array, step: Array) -> Array:
        if not exploration:
            return greedy(q)
        explore_key = jax.random.fold_in(jax.random.fold_in(key, 2), step)  # 0 and 1 are the halves of `split`
        uniform = jax.vmap(jax.random.uniform)(keys_of(explore_key, first_number))
        return epsilon_greedy(q, jnp.float32(exploration), uniform)

    def play(
        params: Params, key: Array, first_number: Array, episodes: EpisodesUnderWay, first_step: Array, num_steps: Array
    ) -> tuple[EpisodesUnderWay, EpisodeStats]:
        _, step_key = jax.random.split(key)

        def has_any_left(has_ended: Array) -> Array:
            """Returns whether any replica still plays. All must take as many steps: on a mesh, steps communicate."""
            return replicas.sum(jnp.any(~has_ended).astype(jnp.int32)) > 0

        def step(carry: tuple[Array, EpisodesUnderWay, Array]) -> tuple[Array, EpisodesUnderWay, Array]:
            time, now, _ = carry
            action = act(q_values(params, now.view), key, first_number, time)
            keys = keys_of(jax.random.fold_in(step_key, time), first_number)
            result = jax.vmap(env.step)(now.env_state, action, keys)
            fingerprint = extend_fingerprints(now.fingerprint, result.observation, result.reward)
            has_ended = now.has_ended | result.terminated | result.truncated
            then = EpisodesUnderWay(
                env_state=result.state,
                view=push_frame(now.view, to_storage_layout(result.observation), nobody, frame_stack),
                episode_return=now.episode_return + jnp.where(now.has_ended, 0.0, result.reward),
                episode_steps=now.episode_steps + ~now.has_ended,
                fingerprint=jnp.where(now.has_ended, now.fingerprint, fingerprint),
                has_ended=has_ended,
            )
            return time + 1, then, has_any_left(has_ended)

        def is_running(carry: tuple[Array, EpisodesUnderWay, Array]) -> Array:
            time, _, any_left = carry
            return (time < first_step + num_steps) & any_left

        start = (first_step, episodes, has_any_left(episodes.has_ended))
        _, episodes, _ = jax.lax.while_loop(is_running, step, start)
        own = EpisodeStats(*(getattr(episodes, name) for name in EpisodeStats._fields))
        return episodes, jax.tree.map(lambda x: replicas.gather(x).reshape(-1)[:num_episodes], own)

    return InGraphEvaluation(begin, play)


class Pieces:
    """The lengths of the calls of a compiled evaluation, which adapt to how long calls take."""

    def __init__(self) -> None:
        self._num_steps = FIRST_PIECE_STEPS

    def play(
        self,
        begin: Callable[[], Any],
        play: Callable[[Any, np.int32, np.int32], tuple[Any, EpisodeStats]],
        spec: EnvSpec,
        max_episode_steps: int | None,
        should_stop: Callable[[], bool] = never,
    ) -> Episodes | None:
        """Returns the episodes, or None if it was stopped. All processes of a run call it together.

        Args:
          begin: `begin() -> episodes`, under way.
          play: `play(episodes, first_step, num_steps) -> episodes, stats`, as `InGraphEvaluation.play` returns them;
            maybe with a leading axis of seeds.
          spec: of the environment.
          max_episode_steps: steps after which an episode is cut, where the environment's time limit isn't lower.
          should_stop: called between two calls. Once it returns True, in any process, the evaluation ends.
        """
        limit = episode_limit(spec, max_episode_steps)
        episodes, first_step = begin(), 0
        while True:
            num_steps = min(self._num_steps, limit - first_step)
            started = time.perf_counter()
            episodes, stats = play(episodes, np.int32(first_step), np.int32(num_steps))
            stats = jax.device_get(stats)
            seconds = time.perf_counter() - started
            first_step += num_steps
            if np.all(stats.has_ended) or first_step >= limit:
                was_cut = ~stats.has_ended & is_below_time_limit(limit, spec)
                return Episodes(stats.episode_return, stats.episode_steps, stats.fingerprint, was_cut)
            announce(f"evaluating {np.sum(stats.has_ended)} of {stats.has_ended.size}")
            if peers.any_of(should_stop())[0]:
                return None
            seconds = peers.firsts(seconds)
            if seconds < PIECE_SECONDS / 2:
                self._num_steps *= 2
            elif seconds > PIECE_SECONDS:
                self._num_steps = max(1, self._num_steps // 2)


def episode_limit(spec: EnvSpec, max_episode_steps: int | None = None) -> int:
    """Returns the steps after which an episode of an evaluation ends at the latest.

    That is the environment's time limit, or `max_episode_steps` if this is lower or there is no time limit. Without
    either it is `MAX_EPISODE_STEPS`.
    """
    given = [limit for limit in (spec.time_limit, max_episode_steps) if limit is not None]
    return min(given, default=MAX_EPISODE_STEPS)


def is_below_time_limit(limit: int, spec: EnvSpec) -> bool:
    """Returns whether an episode that ends at `limit` would go on in the environment."""
    return spec.time_limit is None or limit < spec.time_limit


# --- Environments outside the compiled program ---


def play_host_episodes(
    lanes: HostLanes,
    spec: EnvSpec,
    act: Callable[[Array], Array],
    num_episodes: int,
    seed: int,
    to_storage_layout: Callable[[Array], Array] = identity,
    *,
    exploration: float = 0.0,
    max_episode_steps: int | None = None,
    should_stop: Callable[[], bool] = never,
) -> Episodes | None:
    """Returns the episodes that start first, in the order in which they start, or None if it was stopped.

    Episodes whose environment fails are left out. Counting the episodes that end first would favour short ones.
    Replaying an episode that failed might never end, because the environment may always fail at the same place.

    If failures take more than `MAX_LOST` times as many episodes as are asked for, the evaluation logs a warning and
    returns the whole episodes that it has by then, which may be none: an environment that fails every 1,000 steps never
    completes an episode of 1,000 steps.

    The rest of an episode that is cut counts as another one, because a lane can't be reset alone.

    Args:
      lanes: at least one lane; all are reset.
      spec: the spec of the lanes' environment.
      act: `act(view) -> action`, the greedy one, from `[lanes, ...]` stacks of stored frames to `[lanes]`.
      num_episodes: how many episodes to play, over all lanes.
      seed: seed of these episodes; it must differ from every seed of training.
      to_storage_layout: converts observations to what `act` expects, as `Network.to_storage_layout` does.
      exploration: probability of a uniformly random action.
      max_episode_steps: steps after which an episode is cut, where the environment's time limit isn't lower.
      should_stop: called before every step. Once it returns True, the evaluation ends.
    """
    limit = episode_limit(spec, max_episode_steps)
    push = jax.jit(lambda view, obs, is_first: push_frame(view, to_storage_layout(obs), is_first, spec.frame_stack))
    acting = HostActing(lanes, seed, max_episode_steps=limit)
    view = init_view(to_storage_layout(jnp.asarray(acting.obs)), spec.frame_stack)
    explore = _RandomActions(exploration, seed, len(view), spec.num_actions)
    played = _HostEpisodes(acting.obs, is_below_time_limit(limit, spec))
    num_lost = 0
    while not played.has_all_of_first(num_episodes):
        if should_stop():
            return None
        announce(f"evaluating {min(played.num_whole, num_episodes)} of {num_episodes}")
        acting.send(explore(np.asarray(act(view), np.int32)))
        row = acting.receive()
        played.add(row, acting.obs)
        view = push(view, acting.obs, acting.is_first)
        num_lost += row.num_failures
        if num_lost > MAX_LOST * num_episodes:
            logger.warning(
                "an evaluation lost %d episodes to environments that failed, and was given up with %d whole ones of %d",
                num_lost,
                min(played.num_whole, num_episodes),
                num_episodes,
            )
            break
    return played.first(num_episodes)


class _RandomActions:
    """Replaces actions by random ones now and then. Each lane has random numbers of its own."""

    def __init__(self, exploration: float, seed: int, num_lanes: int, num_actions: int) -> None:
        self._exploration, self._num_actions = exploration, num_actions
        self._generators = [np.random.default_rng((seed, lane)) for lane in range(num_lanes)] if exploration else []

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Returns actions, `[lanes]` int32, of which each is random with the given probability."""
        if not self._generators:
            return action
        uniform = np.array([generator.random() for generator in self._generators])
        # Below the probability, a uniform number divided by it is uniform itself, and picks the action.
        picked = (uniform / self._exploration * self._num_actions).astype(np.int32) % self._num_actions
        return np.where(uniform < self._exploration, picked, action).astype(np.int32)


class _HostEpisodes:
    """The episodes of lanes outside the compiled program, numbered in the order in which they start."""

    def __init__(self, obs: np.ndarray, ends_at_own_limit: bool) -> None:
        self._under_way = np.arange(len(obs))  # the number of each lane's episode
        self._fingerprints = HostFingerprints(obs)
        self._ends_at_own_limit = ends_at_own_limit
        self._whole: dict[int, tuple[float, int, int, bool]] = {}  # by number

    @property
    def num_whole(self) -> int:
        """How many have ended."""
        return len(self._whole)

    def has_all_of_first(self, count: int) -> bool:
        """Returns whether the `count` episodes that started first, without those that failed, have ended."""
        return len(self._whole) >= count and sorted(self._whole)[count - 1] <= int(np.min(self._under_way))

    def add(self, row: Any, obs: np.ndarray) -> None:
        """Adds a `ReceivedRow` and the observations after it, `[lanes, ...]`."""
        self._fingerprints.extend(obs, row.reward)
        at_limit = row.episode_ended & ~row.terminated & ~row.truncated
        for lane in np.flatnonzero(row.episode_ended):
            self._whole[int(self._under_way[lane])] = (
                float(row.episode_return[lane]),
                int(row.episode_steps[lane]),
                int(self._fingerprints.values[lane]),
                bool(at_limit[lane] & self._ends_at_own_limit),
            )
        is_next = row.episode_ended | row.failed
        self._under_way[is_next] = np.max(self._under_way) + 1 + np.arange(np.sum(is_next))
        self._fingerprints.begin(row.no_step | at_limit, obs)

    def first(self, count: int) -> Episodes:
        """Returns the first `count` episodes that have ended, or all if they are fewer."""
        numbers = sorted(self._whole)[:count]
        columns = zip(*(self._whole[number] for number in numbers), strict=True) if numbers else [()] * 4
        kinds = (np.float32, np.int32, np.uint32, bool)
        return Episodes(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))
