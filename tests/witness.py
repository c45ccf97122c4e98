"""An environment whose observations tell where they come from, and a judge of the replays that it fills."""

import os
import time
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from qfleet.config import ActorPool, RayTopologyConfig, TrainConfig
from qfleet.core.replay import SavedReplay
from qfleet.core.replay.ring import CONTINUED, NO_STEP, TERMINATED, TRUNCATED
from qfleet.envs.failures import lane_seed

WORD = 2**24
"""Whole numbers below this are exact in float32."""

MOST_INCARNATIONS = 100
"""Number of incarnations of one actor whose seeds the judge knows."""


class Witness(gymnasium.Env):
    """Observes `[identity, identity, seed, episode, step]`, all below `WORD`; step n pays n + action / 10.

    Every environment that is made has its own identity, in any process and run. The seed is that of the last seeded
    reset. Episodes 0, 2, 4 ... terminate and the others are truncated, each after `length_of(episode)` steps.
    """

    observation_space = gymnasium.spaces.Box(0, WORD, (5,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, slow_seconds: float = 0.0, once: str = "") -> None:
        """Makes an environment.

        Args:
          slow_seconds: additional seconds that each step takes, in one process only.
          once: file that marks the slow process: the first process to take a step creates it.
        """
        self.identity = [int.from_bytes(os.urandom(3)) for _ in range(2)]
        self.slow_seconds, self.once = slow_seconds, once
        self.seed, self.episode, self.steps = 0, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seed = self.seed if seed is None else seed % WORD
        self.episode, self.steps = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.slow_seconds and self.is_slow():
            time.sleep(self.slow_seconds)
        self.steps += 1
        is_over, terminates = self.steps >= length_of(self.episode), self.episode % 2 == 0
        reward = self.steps + action / 10
        return self.observe(), reward, is_over and terminates, is_over and not terminates, {}

    def observe(self) -> np.ndarray:
        return np.array([*self.identity, self.seed, self.episode, self.steps], np.float64)

    def is_slow(self) -> bool:
        try:
            with open(self.once, "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            pass
        with open(self.once) as file:
            return file.read() == str(os.getpid())


class Verdict(NamedTuple):
    """The result of judging a replay."""

    num_rows: int
    """Number of rows that the replay holds, over all lanes."""
    num_writers: int
    """Number of environments that the rows come from."""
    num_cuts: int
    """Number of places where a row isn't the successor of the one before it."""
    faults: tuple[str, ...]
    """What is wrong, each with the number of rows and the first of them."""


def length_of(episode: Any) -> Any:
    """Returns the number of steps of an episode, or of each episode in an array."""
    return 5 + episode * 7 % 23


def judge(saved: SavedReplay, config: TrainConfig) -> Verdict:
    """Judges whether a replay of actors or workers holds each step of their environments once, in order, in place."""
    pool = config.topology_as(RayTopologyConfig).actor_pool
    ring, seeds = saved.ring, _seeds(config, pool)
    faults: dict[str, list[str]] = {}
    known: set[int] = set()  # environments
    num_rows = num_cuts = 0

    def accuse(lane: int, what: str, is_wrong: np.ndarray) -> None:
        faults.setdefault(what, []).extend(f"lane {lane}, row {i}" for i in np.flatnonzero(is_wrong))

    for lane in range(pool.num_lanes):
        actor, lane_of_actor = divmod(lane, pool.lanes_per_actor)
        order = (int(ring.cursor[actor]) - int(ring.size[actor]) + np.arange(int(ring.size[actor]))) % ring.num_rows
        num_rows += len(order)
        obs = np.asarray(ring.rows.obs)[order, lane].astype(np.int64)
        action, reward, outcome = (
            np.asarray(column)[order, lane] for column in (ring.rows.action, ring.rows.reward, ring.rows.outcome)
        )
        leaf = np.asarray(saved.leaves)[order, lane]
        who, seed, episode, step = obs[:, 0] * WORD + obs[:, 1], obs[:, 2], obs[:, 3], obs[:, 4]
        length, is_step = length_of(episode), outcome != NO_STEP

        # Judges each row by itself.
        accuse(lane, "beyond an episode's end", step > length)
        accuse(lane, "a step from a final observation", is_step & (step == length))
        accuse(lane, "another reward than was paid", is_step & (abs(reward - (step + 1 + action / 10)) > 1e-3))
        accuse(lane, "another actor's or lane's", ~np.isin(seed, seeds[actor, :, lane_of_actor]))
        accuse(lane, "can be drawn, and holds no step", ~is_step & (leaf > 0))

        # Judges each row together with its successor, if it has one.
        same = (who[1:] == who[:-1]) & (episode[1:] == episode[:-1]) & (step[1:] == step[:-1] + 1)
        begins = (who[1:] == who[:-1]) & (episode[1:] == episode[:-1] + 1) & (step[1:] == 0) & (step == length)[:-1]
        is_last, terminates = (step + 1 == length)[:-1], (episode % 2 == 0)[:-1]
        now, then = outcome[:-1], outcome[1:]
        accuse(lane, "stitched to another episode", (now != NO_STEP) & ~same)
        accuse(lane, "terminates where it doesn't", (now == TERMINATED) & ~(is_last & terminates))
        accuse(lane, "truncated in the midst", (now == TRUNCATED) & ~(is_last & ~terminates) & (then != NO_STEP))
        accuse(lane, "goes on beyond the end", (now == CONTINUED) & (is_last | (then == NO_STEP)))
        accuse(lane, "ends and goes on", is_last & (now != NO_STEP) & (then != NO_STEP))
        is_cut = ~same & ~begins
        num_cuts += int(np.sum(is_cut))
        in_order = (who[1:] != who[:-1]) | (episode[1:] * 64 + step[1:] > episode[:-1] * 64 + step[:-1])
        accuse(lane, "out of order", np.append(False, ~in_order))
        number = np.argmax(seeds[actor, :, lane_of_actor] == seed[:, None], axis=1)
        accuse(lane, "written after its actor was replaced", np.append(False, number[1:] < number[:-1]))

        starts = np.flatnonzero(np.append(True, who[1:] != who[:-1])[: len(who)])
        for i in starts:
            accuse(lane, "of an environment that had been left", (np.arange(len(who)) == i) & (int(who[i]) in known))
            known.add(int(who[i]))
    said = tuple(f"{what}: {len(where)}, first {where[0]}" for what, where in faults.items() if where)
    return Verdict(num_rows, len(known), num_cuts, said)


def _seeds(config: TrainConfig, pool: ActorPool) -> np.ndarray:
    """Returns what the environments show as their seeds: `[actors, incarnations, lanes_per_actor]`."""
    numbers = np.zeros((pool.num_actors, MOST_INCARNATIONS, pool.lanes_per_actor), np.int64)
    for actor, incarnation, lane in np.ndindex(*numbers.shape):
        drawn = int(np.random.default_rng((config.seed, 2, actor, incarnation)).integers(2**32))
        numbers[actor, incarnation, lane] = lane_seed(drawn, lane, 0) % WORD
    return numbers


gymnasium.register("Witness-v0", entry_point="witness:Witness")
