"""What the checks of a diagnosis look at: a run's metrics, config and summary, and what follows from them."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qfleet.config import GossipConfig, TrainConfig

LEARNED = 0.25
"""Share of the first returns by which the newest must be better for a run to count as one that learns."""

MIN_LEARNER_STEPS = 300
"""Least number of learner steps before values or parameters mean anything."""


class Evidence:
    """The evidence of one run."""

    def __init__(self, metrics: Mapping[str, np.ndarray], config: TrainConfig, summary: Mapping[str, Any]) -> None:
        self._metrics, self.config, self.agent, self.summary = metrics, config, config.agent, summary
        self.has_replay = config.agent.replay != "none"
        self.env_steps, self.learner_steps = (int(self.newest(name) or 0) for name in ("env_steps", "learner_steps"))

    def column(self, name: str) -> np.ndarray:
        """Returns the values of a metric, NaN where a record has none; all NaN if no record has any."""
        values = self._metrics.get(name)
        return np.full(len(self._metrics["env_steps"]), np.nan) if values is None else np.asarray(values, float)

    def values(self, name: str) -> np.ndarray:
        """Returns the values of a metric that there are."""
        column = self.column(name)
        return column[np.isfinite(column)]

    def newest(self, name: str) -> float | None:
        """Returns the newest value of a metric, None if there is none."""
        values = self.values(name)
        return float(values[-1]) if len(values) else None

    def largest(self, *names: str) -> float | None:
        """Returns the greatest absolute value of some metrics, None if there is none."""
        values = np.abs(np.concatenate([self.values(name) for name in names]))
        return float(values.max()) if len(values) else None

    @functools.cached_property
    def has_learned(self) -> bool:
        """Whether the newest quarter of the evaluations is clearly better than the first training episodes.

        Before it has taken some steps, a learner that plays well is a lucky one.
        """
        first, newest = self.values("episode_return_mean"), self.values("eval_return_mean")
        if not len(first) or not len(newest) or self.learner_steps < MIN_LEARNER_STEPS:
            return False
        before = float(np.mean(first[: max(1, len(first) // 20)]))
        now = float(np.mean(newest[-max(1, len(newest) // 4) :]))
        return now - before > max(LEARNED * abs(before), 1e-3)

    @functools.cached_property
    def first_reward_at(self) -> float:
        """Environment steps of the first record that tells of a reward; infinity if none does."""
        names = ("episode_return_mean", "eval_return_mean", "reward_abs_max")
        has_reward = np.any([np.abs(np.nan_to_num(self.column(name))) > 0 for name in names], axis=0)
        return float(self.column("env_steps")[has_reward][0]) if np.any(has_reward) else math.inf

    @property
    def num_episodes(self) -> int:
        """Training episodes that have ended."""
        return int(self.values("num_episodes").sum())

    @functools.cached_property
    def horizon(self) -> float:
        """Environment steps that count in a value: 1 / (1 - discount), or the mean length of episodes if that is less.

        Source: the sum of discount**t over all t.
        """
        length = self.newest("episode_length_mean") or math.inf
        return min(1 / (1 - self.agent.discount) if self.agent.discount < 1 else math.inf, length)

    @property
    def num_learners(self) -> int:
        """Learners that share the learner steps of the run: the peers of gossip, and one in all other topologies.

        `learner_steps` are those of one of them.
        """
        topology = self.config.topology
        return topology.num_processes if isinstance(topology, GossipConfig) else 1

    @property
    def target_age(self) -> float:
        """Learner steps in which the target network is replaced."""
        return self.agent.target_update_period / self.agent.target_update_rate

    @functools.cached_property
    def moves(self) -> np.ndarray:
        """How far the parameters moved between evaluations, as a multiple of the norm that they had before."""
        ratio, steps = self.column("update_ratio"), self.column("learner_steps")
        measured = np.flatnonzero(np.isfinite(ratio))
        between = np.diff(steps[measured], prepend=0.0)
        return ratio[measured] * between
