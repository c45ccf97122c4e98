"""Evaluation: whole episodes of a greedy policy, apart from training, in environments written in JAX.

A compiled program plays them, and is called for a bounded number of steps at a time. Module `host_evaluation` plays
those of other environments.

With `exploration` above 0 the policy takes a uniformly random action with that probability, as published evaluations of
deterministic games do. There, a strictly greedy policy plays one episode again and again.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config.checks import MAX_PROCESSES, MAX_SECONDS, MAX_SIZE, check, check_count, check_positive
from qfleet.config.values import Config
from qfleet.core.activity import Activity, dormant_fraction, sum_where
from qfleet.core.exploration import explorer, greedy
from qfleet.core.memory import MemoryState
from qfleet.core.player import Player
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import EnvSpec, Params
from qfleet.envs.host import LaneOptions
from qfleet.envs.spec import EnvState, InGraphEnv, StepResult
from qfleet.runtime import peers
from qfleet.runtime.activity import announce
from qfleet.runtime.fingerprint import extend_fingerprints

MAX_EPISODE_STEPS = 27_000
"""The longest episode where no limit is known: half an hour of Atari at 60 frames/s."""

PIECE_SECONDS = 0.25
"""Longest time that one call of the compiled program should take: a request to stop is heard between two calls."""

FIRST_PIECE_STEPS = 32
"""Environment steps of the first call. Later calls take more, as far as `PIECE_SECONDS` allows."""

STEPS_PER_CHECK = 16
"""Environment steps after which replicas ask each other whether all episodes have ended. Each time takes a message."""


def never() -> bool:
    """Returns False: nobody asks to stop."""
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Config):
    """How episodes are played to evaluate a policy."""

    exploration: float = 0.0
    """Probability of a uniformly random action."""
    max_episode_steps: int | None = None
    """Environment steps after which an episode is cut; None leaves it to the environment's time limit. Without one it
    means 27,000."""
    num_env_workers: int = 0
    """Processes that step an environment that is not written in JAX; with 0, this process does."""
    step_timeout_seconds: float = LaneOptions.step_timeout_seconds
    """Longest time that one step or reset may take in such a process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.exploration < 1, "exploration", "at least 0 and below 1", self.exploration)
        if self.max_episode_steps is not None:
            check_count("max_episode_steps", self.max_episode_steps, maximum=MAX_SIZE)
        check_count("num_env_workers", self.num_env_workers, minimum=0, maximum=MAX_PROCESSES)
        check_positive(self, "step_timeout_seconds", maximum=MAX_SECONDS)


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
    has_terminated: np.ndarray | None = None
    """bool: it ended in a state without a future; otherwise a time limit ended it, or the evaluation cut it."""
    first_values: np.ndarray | None = None
    """float32, the greatest Q-value of the first observation."""
    discounted_returns: np.ndarray | None = None
    """float32, what `first_values` should be: the rewards, discounted to the first observation. If the episode didn't
    terminate, the last reward gives way to the greatest Q-value of the last observation acted on: the episode would
    have gone on, and training bootstraps there too."""
    dormant_fractions: np.ndarray | None = None
    """float32, the share of dormant hidden units over all episodes that were played at once. NaN if unknown."""

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
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1)[..., :num_episodes], *batches)


class EpisodesUnderWay(NamedTuple):
    """Episodes that a compiled program steps together. Leading axis `[episodes]` everywhere."""

    env_state: EnvState
    memory: MemoryState
    """What the agent remembers."""
    episode_return: Array
    """float32, undiscounted, so far."""
    episode_steps: Array
    """int32, so far."""
    fingerprint: Array
    """uint32, so far."""
    has_ended: Array
    """bool."""
    has_terminated: Array
    """bool, it has ended in a state without a future."""
    first_value: Array
    """float32, the greatest Q-value of the first observation."""
    discounted_rewards: Array
    """float32, the sum so far."""
    discounted_return: Array
    """float32, as in `Episodes`, if the episode ended here."""


class EpisodeStats(NamedTuple):
    """What the host reads after each call of the program, `[episodes]` over all replicas unless said otherwise."""

    episode_return: Array
    episode_steps: Array
    fingerprint: Array
    has_ended: Array
    has_terminated: Array
    first_value: Array
    discounted_return: Array
    activity: Activity
    """For each hidden layer `[units]`, the activity summed over the observations of this call."""


class InGraphEvaluation(NamedTuple):
    """The pure functions of an evaluation. Each replica runs them on its share of the episodes."""

    begin: Callable[[Array, Array], EpisodesUnderWay]
    """`begin(key, first_number) -> episodes`, which are numbered from `first_number`, `[]` uint32."""
    play: Callable[[Params, Array, Array, EpisodesUnderWay, Array, Array], tuple[EpisodesUnderWay, EpisodeStats]]
    """`play(params, key, first_number, episodes, first_step, num_steps)` takes at most `num_steps` further steps of all
    episodes, which have taken `first_step` steps so far. It returns early once all of them have ended."""


def make_evaluation(
    env: InGraphEnv,
    player: Player,
    num_episodes: int,
    exploration: float = 0.0,
    replicas: Replicas = ALONE,
    discount: float | Array = 1.0,
) -> InGraphEvaluation:
    """Returns the functions that play `num_episodes` at once. Results don't depend on the lengths of the calls.

    Args:
      env: environment to play.
      player: plays it.
      num_episodes: number of episodes, over all replicas.
      exploration: probability of a uniformly random action.
      replicas: the replicas among which the episodes are divided.
      discount: of the discounted returns, per environment step.
    """
    num_own = -(-num_episodes // replicas.size)
    check_period = 1 if replicas.size == 1 else STEPS_PER_CHECK
    nobody: Any = np.zeros(num_own, bool)  # of NumPy, because JAX would compile a program for it here

    def keys_of(key: Array, first_number: Array) -> Array:
        numbers = first_number + local_lane_ids(replicas, num_own)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    def begin(key: Array, first_number: Array) -> EpisodesUnderWay:
        reset_key, _ = jax.random.split(key)
        env_state, obs = jax.vmap(env.reset)(keys_of(reset_key, first_number))
        return _new_episodes(env_state, obs, player.begin(obs))

    def act(q: Array, key: Array, first_number: Array, step: Array) -> Array:
        if not exploration:
            return greedy(q)
        explore_key = jax.random.fold_in(jax.random.fold_in(key, 2), step)  # 0 and 1 are the halves of `split`
        uniform = jax.vmap(jax.random.uniform)(keys_of(explore_key, first_number))
        return explorer("epsilon_greedy", is_masked=env.spec.has_action_mask)(q, jnp.float32(exploration), uniform)

    def play(
        params: Params, key: Array, first_number: Array, episodes: EpisodesUnderWay, first_step: Array, num_steps: Array
    ) -> tuple[EpisodesUnderWay, EpisodeStats]:
        _, step_key = jax.random.split(key)

        def has_any_left(has_ended: Array) -> Array:
            """Returns whether any replica still plays. All must take as many steps: on a mesh, steps communicate."""
            return replicas.sum(jnp.any(~has_ended).astype(jnp.int32)) > 0

        def step(carry: tuple[Array, EpisodesUnderWay, Activity, Array]) -> tuple:
            time, now, activity, _ = carry
            q, memory, active = player.values(params, now.memory)
            action = act(q, key, first_number, time)
            keys = keys_of(jax.random.fold_in(step_key, time), first_number)
            result = jax.vmap(env.step)(now.env_state, action, keys)
            then = _after_step(now, result, jnp.max(q, axis=-1), discount)
            then = then._replace(memory=player.observe(memory, result.observation, nobody))
            activity = jax.tree.map(jnp.add, activity, sum_where(active, ~now.has_ended))
            any_left = jax.lax.cond(
                time % check_period == 0, lambda: has_any_left(then.has_ended), lambda: jnp.bool_(True)
            )
            return time + 1, then, activity, any_left

        def is_running(carry: tuple[Array, EpisodesUnderWay, Activity, Array]) -> Array:
            time, _, _, any_left = carry
            return (time < first_step + num_steps) & any_left

        _, _, shapes = jax.eval_shape(player.values, params, episodes.memory)
        no_activity = tuple(jnp.zeros(layer.shape[1:]) for layer in shapes)
        start = (first_step, episodes, no_activity, has_any_left(episodes.has_ended))
        _, episodes, activity, _ = jax.lax.while_loop(is_running, step, start)
        own = {name: getattr(episodes, name) for name in EpisodeStats._fields if name != "activity"}
        gathered = jax.tree.map(lambda x: replicas.gather(x).reshape(-1)[:num_episodes], own)
        return episodes, EpisodeStats(**gathered, activity=replicas.sum(activity))

    return InGraphEvaluation(begin, play)


def _new_episodes(env_state: EnvState, obs: Array, memory: MemoryState) -> EpisodesUnderWay:
    """Returns episodes that begin with these observations, `[episodes, ...]`."""
    zeros = jnp.zeros(len(obs))
    return EpisodesUnderWay(
        env_state,
        memory,
        episode_return=zeros,
        episode_steps=zeros.astype(jnp.int32),
        fingerprint=extend_fingerprints(zeros.astype(jnp.uint32), obs, zeros),
        has_ended=zeros > 0,
        has_terminated=zeros > 0,
        first_value=zeros,
        discounted_rewards=zeros,
        discounted_return=zeros,
    )


def _after_step(now: EpisodesUnderWay, result: StepResult, value: Array, discount: float | Array) -> EpisodesUnderWay:
    """Returns the episodes after a step that observations of these values led to; what is remembered stays as it is."""

    def unless_ended(new: Array, old: Array) -> Array:
        return jnp.where(now.has_ended, old, new)

    scale = jnp.float32(discount) ** now.episode_steps.astype(jnp.float32)
    rewards = now.discounted_rewards + scale * result.reward
    bootstrapped = now.discounted_rewards + scale * value
    fingerprint = extend_fingerprints(now.fingerprint, result.observation, result.reward)
    return now._replace(
        env_state=result.state,
        episode_return=now.episode_return + jnp.where(now.has_ended, 0.0, result.reward),
        episode_steps=now.episode_steps + ~now.has_ended,
        fingerprint=unless_ended(fingerprint, now.fingerprint),
        has_ended=now.has_ended | result.terminated | result.truncated,
        has_terminated=unless_ended(result.terminated, now.has_terminated),
        first_value=jnp.where(now.episode_steps == 0, value, now.first_value),
        discounted_rewards=unless_ended(rewards, now.discounted_rewards),
        discounted_return=unless_ended(jnp.where(result.terminated, rewards, bootstrapped), now.discounted_return),
    )


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
        episodes, first_step, activity = begin(), 0, []
        while True:
            num_steps = min(self._num_steps, limit - first_step)
            started = time.perf_counter()
            episodes, stats = play(episodes, np.int32(first_step), np.int32(num_steps))
            stats = jax.device_get(stats)
            seconds = time.perf_counter() - started
            first_step += num_steps
            activity.append(stats.activity)
            if np.all(stats.has_ended) or first_step >= limit:
                return _whole(stats, activity, is_below_time_limit(limit, spec))
            announce(f"evaluating {np.sum(stats.has_ended)} of {stats.has_ended.size}")
            if peers.any_of(should_stop())[0]:
                return None
            seconds = peers.firsts(seconds)
            if seconds < PIECE_SECONDS / 2:
                self._num_steps *= 2
            elif seconds > PIECE_SECONDS:
                self._num_steps = max(1, self._num_steps // 2)


def _whole(stats: Any, activity: list[Any], ends_at_own_limit: bool) -> Episodes:
    """Returns the episodes that the program's last call leaves, from `EpisodeStats` on the host.

    Args:
      stats: of the last call.
      activity: `EpisodeStats.activity` of all calls.
      ends_at_own_limit: whether episodes that haven't ended have been cut by the evaluation.
    """
    dormant = dormant_fraction(tuple(np.sum(layers, axis=0) for layers in zip(*activity, strict=True)))
    return Episodes(
        returns=stats.episode_return,
        lengths=stats.episode_steps,
        fingerprints=stats.fingerprint,
        was_cut=~stats.has_ended & ends_at_own_limit,
        has_terminated=stats.has_terminated,
        first_values=stats.first_value,
        discounted_returns=stats.discounted_return,
        dormant_fractions=np.broadcast_to(dormant[..., None], stats.episode_return.shape),
    )


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
