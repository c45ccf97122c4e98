"""Evaluation in environments outside the compiled program: lanes that only evaluation uses."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.activity import Activity, dormant_fraction
from qfleet.core.masks import or_all, random_valid, split_lanes
from qfleet.core.memory import MemoryState
from qfleet.core.player import Player
from qfleet.core.types import EnvSpec
from qfleet.envs.host import HostLanes
from qfleet.runtime.activity import announce
from qfleet.runtime.evaluation import Episodes, episode_limit, is_below_time_limit, never
from qfleet.runtime.fingerprint import HostFingerprints
from qfleet.runtime.host_acting import HostActing, ReceivedRow

logger = logging.getLogger("qfleet")

MAX_LOST = 3
"""Number of episodes that an evaluation may lose to failures, per episode that it asks for."""


class HostAction(NamedTuple):
    """What is chosen at each lane's observation, `[lanes]`."""

    action: Array
    """int32, the greedy one."""
    value: Array
    """float32, the greatest Q-value."""
    memory: MemoryState
    """What the agent remembers from now on."""
    activity: Activity = ()
    """For each hidden layer `[units]`, the activity summed over all observations so far."""


def play_host_episodes(
    lanes: HostLanes,
    spec: EnvSpec,
    player: Player,
    act: Callable[[MemoryState], HostAction],
    num_episodes: int,
    seed: int,
    *,
    exploration: float = 0.0,
    max_episode_steps: int | None = None,
    should_stop: Callable[[], bool] = never,
    discount: float = 1.0,
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
      player: plays the episodes, but `act` acts.
      act: the greedy actions of `player`.
      num_episodes: how many episodes to play, over all lanes.
      seed: seed of these episodes; it must differ from every seed of training.
      exploration: probability of a uniformly random action.
      max_episode_steps: steps after which an episode is cut, where the environment's time limit isn't lower.
      should_stop: called before every step. Once it returns True, the evaluation ends.
      discount: of the discounted returns, per environment step.
    """
    limit = episode_limit(spec, max_episode_steps)
    observe = jax.jit(player.observe)
    acting = HostActing(lanes, seed, max_episode_steps=limit)
    memory = player.begin(jnp.asarray(acting.obs))
    explore = _RandomActions(exploration, seed, len(acting.obs), spec)
    played = _HostEpisodes(acting.obs, is_below_time_limit(limit, spec), discount)
    num_lost = 0
    while not played.has_all_of_first(num_episodes):
        if should_stop():
            return None
        announce(f"evaluating {min(played.num_whole, num_episodes)} of {num_episodes}")
        chosen = act(memory)
        acting.send(explore(np.asarray(chosen.action, np.int32), acting.obs))
        row = acting.receive()
        played.add(row, acting.obs, chosen)
        memory = observe(chosen.memory, acting.obs, acting.is_first)
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

    def __init__(self, exploration: float, seed: int, num_lanes: int, spec: EnvSpec) -> None:
        self._exploration, self._spec = exploration, spec
        self._generators = [np.random.default_rng((seed, lane)) for lane in range(num_lanes)] if exploration else []

    def __call__(self, action: np.ndarray, obs: np.ndarray) -> np.ndarray:
        """Returns actions, `[lanes]` int32, of which each is random with the given probability, and valid at `obs`."""
        if not self._generators:
            return action
        uniform = np.array([generator.random() for generator in self._generators])
        is_valid = or_all(split_lanes(obs, self._spec)[1])
        # Below the probability, a uniform number divided by it is uniform itself, and picks the action.
        picked = (uniform / self._exploration * is_valid.sum(axis=-1)).astype(np.int32)
        return np.where(uniform < self._exploration, random_valid(is_valid, picked), action).astype(np.int32)


class _HostEpisodes:
    """The episodes of lanes outside the compiled program, numbered in the order in which they start."""

    def __init__(self, obs: np.ndarray, ends_at_own_limit: bool, discount: float) -> None:
        self._under_way = np.arange(len(obs))  # the number of each lane's episode
        self._fingerprints = HostFingerprints(obs)
        self._values = _Values(len(obs), discount)
        self._ends_at_own_limit = ends_at_own_limit
        self._whole: dict[int, tuple] = {}  # by number, in the order of the fields of `Episodes`
        self._activity: Activity = ()

    @property
    def num_whole(self) -> int:
        """How many have ended."""
        return len(self._whole)

    def has_all_of_first(self, count: int) -> bool:
        """Returns whether the `count` episodes that started first, without those that failed, have ended."""
        return len(self._whole) >= count and sorted(self._whole)[count - 1] <= int(np.min(self._under_way))

    def add(self, row: ReceivedRow, obs: np.ndarray, chosen: HostAction) -> None:
        """Adds a row, the observations after it, `[lanes, ...]`, and the actions that led to it."""
        self._fingerprints.extend(obs, row.reward)
        self._values.add(row, np.asarray(chosen.value))
        self._activity = chosen.activity
        at_limit = row.episode_ended & ~row.terminated & ~row.truncated
        for lane in np.flatnonzero(row.episode_ended):
            self._whole[int(self._under_way[lane])] = (
                row.episode_return[lane],
                row.episode_steps[lane],
                self._fingerprints.values[lane],
                at_limit[lane] & self._ends_at_own_limit,
                row.terminated[lane],
                self._values.first[lane],
                self._values.discounted_return[lane],
            )
        is_next = row.episode_ended | row.failed
        self._under_way[is_next] = np.max(self._under_way) + 1 + np.arange(np.sum(is_next))
        self._fingerprints.begin(row.no_step | at_limit, obs)

    def first(self, count: int) -> Episodes:
        """Returns the first `count` episodes that have ended, or all if they are fewer."""
        numbers = sorted(self._whole)[:count]
        kinds = (np.float32, np.int32, np.uint32, bool, bool, np.float32, np.float32)
        columns = zip(*(self._whole[number] for number in numbers), strict=True) if numbers else [()] * len(kinds)
        arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        arrays.append(np.full(len(numbers), dormant_fraction(jax.device_get(self._activity))))
        return Episodes(*arrays)


class _Values:
    """The value of each lane's first observation, and the discounted return to compare it with."""

    def __init__(self, num_lanes: int, discount: float) -> None:
        self.first, self.discounted_return = np.zeros(num_lanes), np.zeros(num_lanes)
        self._rewards, self._discount = np.zeros(num_lanes), discount

    def add(self, row: ReceivedRow, value: np.ndarray) -> None:
        """Adds a row, and the greatest Q-values of the observations acted on, `[lanes]`."""
        is_first = row.episode_steps == 1
        before = np.where(is_first, 0.0, self._rewards)
        scale = self._discount ** np.maximum(row.episode_steps - 1.0, 0.0)
        self.first = np.where(is_first, value, self.first)
        self._rewards = before + scale * row.reward
        self.discounted_return = np.where(row.terminated, self._rewards, before + scale * value)
