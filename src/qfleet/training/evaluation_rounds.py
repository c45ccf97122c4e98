"""The evaluations of a run: whether one is due, how long its episodes may get, and what they show."""

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from qfleet.config import TrainConfig
from qfleet.runtime import peers
from qfleet.runtime.evaluation import MAX_EPISODE_STEPS, Episodes
from qfleet.runtime.records import Progress, Sum
from qfleet.runtime.run_directory import strict_json
from qfleet.topologies.base import Topology
from qfleet.training.measuring import UpdateSizes, episode_measures

logger = logging.getLogger("qfleet")

CONFIRMING_EPISODES = 100
"""Number of fresh episodes whose mean must confirm a return. That 20 episodes reach it once is partly luck."""

LENGTH_FACTOR = 10
"""Limit of an episode where there is no time limit, in mean lengths of training episodes. Most environments have less
than one in 20,000 episodes of that length by chance; a policy that goes round in circles always has."""

LEAST_LENGTH_FACTOR = 2
"""The same, for an evaluation that can't afford more: it waits rather than cut most episodes."""

MIN_LIMIT = 1_000
"""The least limit of an episode where there is no time limit, in environment steps."""

MAX_SAVED_RETURNS = 100_000
"""Most returns of single episodes that a checkpoint keeps of the newest evaluation, which takes some 2 MB."""

_NO_EVALUATION: dict[str, Any] = {
    "eval_at_env_steps": None,
    "eval_return_mean": None,
    "eval_returns": None,
    "eval_num_different": None,
    "eval_num_cut": None,
    "eval_episode_limit": None,
}


class EvaluationRounds:
    """Plays the evaluations of one run, and remembers the newest.

    All processes of a run that act together decide alike, because what they decide by is the same for all of them: the
    config, the number of environment steps, and the first process's lengths of training episodes. No clock is involved,
    so a seed means the same run on every machine.
    """

    def __init__(self, config: TrainConfig, topology: Topology, time_limit: int | None) -> None:
        """Evaluates nothing yet.

        Args:
          config: of the run.
          topology: whose newest parameters play.
          time_limit: of the environment's episodes, in environment steps; None if there is none.
        """
        self._config, self._topology, self._time_limit = config, topology, time_limit
        self._lengths = Sum()  # of the training episodes of this period
        self._mean_length = 0.0  # of the training episodes of the newest period that had any
        self._env_steps_taken = 0.0  # by all evaluations, of each seed
        self._has_warned = False
        self._new_episodes: list[int | None] = [None] * config.num_seeds
        self._newest = dict(_NO_EVALUATION)
        self._fresh: Episodes | None = None  # of the parameters of the newest evaluation, apart from its own
        self._newest_length = 0.0  # of the newest evaluation, in environment steps of each seed
        self._updates = UpdateSizes()

    @property
    def summary(self) -> dict[str, Any]:
        """The evaluations' entries of summary.json: those of the newest one, or None if there was none."""
        return {
            **self._newest,
            "eval_exploration": self._config.eval_exploration,
            "confirmed_by_new_episodes": self._new_episodes,
        }

    @property
    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `restore`."""
        is_huge = sum(map(len, self._newest["eval_returns"] or [])) > MAX_SAVED_RETURNS
        newest = {**self._newest, "eval_returns": None} if is_huge else self._newest
        return {
            "newest": json.loads(strict_json(newest)),  # returns may not be finite
            "new_episodes": self._new_episodes,
            "env_steps_taken": self._env_steps_taken,
            "mean_length": self._mean_length,
            "lengths": list(self._lengths),
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Goes on from what a checkpoint keeps, if it keeps anything."""
        if saved is not None:
            self._newest, self._new_episodes = saved["newest"], saved["new_episodes"]
            self._env_steps_taken, self._mean_length = saved["env_steps_taken"], saved["mean_length"]
            self._lengths = Sum(*saved["lengths"])

    def add(self, progress: Progress) -> None:
        """Notes the lengths of the training episodes of a chunk."""
        self._updates.begin(self._topology)
        if progress.episode_length_mean is not None:
            total, count = self._lengths
            new = progress.episode_length_mean * progress.num_episodes
            self._lengths = Sum(total + new, count + progress.num_episodes)

    def evaluate(self, unsolved: np.ndarray, should_stop: Callable[[], bool]) -> tuple[dict[str, Any], np.ndarray]:
        """Evaluates the newest parameters, unless that must wait or is stopped.

        A seed has reached the return to stop at once both these episodes and fresh ones say so. If environments fail,
        so that fewer episodes are played than are due, no seed counts.

        Args:
          unsolved: `[seeds]` bool, the seeds that haven't reached it yet.
          should_stop: called now and then. Once it returns True, the evaluation ends without a result.

        Returns:
          The evaluation's fields of `Progress`, none if there was no evaluation; and which seeds have just reached the
          return to stop at, `[seeds]` bool.
        """
        nobody = np.zeros(self._config.num_seeds, bool)
        is_due, limit = self._plan()
        if not is_due:
            return {}, nobody
        episodes, self._fresh = self._play(self._config.eval_episodes, 0, limit, should_stop), None
        if episodes is None or not episodes.returns.size:
            return {}, nobody
        reached = unsolved & self._reaches(episodes, self._config.eval_episodes)
        if np.any(reached):
            self._fresh = fresh = self._play(CONFIRMING_EPISODES, 1, limit, should_stop)
            reached &= False if fresh is None else self._reaches(fresh, CONFIRMING_EPISODES)
            for seed in np.flatnonzero(reached):
                assert fresh is not None
                self._new_episodes[seed] = int(fresh.num_different(episodes)[seed])
        evaluated = {
            "eval_returns": tuple(map(tuple, episodes.returns.tolist())),
            "eval_num_different": int(episodes.num_different().sum()),
            "eval_num_cut": int(episodes.was_cut.sum()),
            "measures": {
                **episode_measures(episodes),
                **self._updates.measure(self._topology),
                **self._topology.replay_measures(),
            },
        }
        return evaluated, reached

    def confirm(self, should_stop: Callable[[], bool]) -> np.ndarray | None:
        """Returns the returns of fresh episodes of the newest parameters, right after they were evaluated.

        They are as many as the evaluation has, so that it takes twice as long at most. If the evaluation has already
        played fresh episodes, for the return to stop at, those are returned. Without a time limit, an evaluation that
        has taken so many steps that another one would exceed the steps of training isn't confirmed.

        Args:
          should_stop: as for `evaluate`.

        Returns:
          `[seeds, episodes]`, or None if there are none: it was stopped, isn't affordable, or environments fail.
        """
        newest, num_episodes = self._newest, self._config.eval_episodes
        if self._fresh is None:
            if self._time_limit is None and self._env_steps_taken + self._newest_length > self._topology.env_steps:
                return None
            self._fresh = self._play(num_episodes, 1, newest["eval_episode_limit"], should_stop)
            self._newest = newest
        is_whole = self._fresh is not None and self._fresh.returns.shape[1] >= num_episodes
        return self._fresh.returns if self._fresh is not None and is_whole else None

    def _plan(self) -> tuple[bool, int | None]:
        """Returns whether to evaluate now, and the limit of an episode, in steps; None leaves it to the time limit.

        Without a time limit, the steps of all evaluations stay below those of training, except that an evaluation may
        always take `MIN_LIMIT` steps per episode, and that the last one always takes place. What evaluations of other
        environments cost is predictable, and up to the user.
        """
        given, env_steps = self._config.eval_max_episode_steps, self._topology.env_steps
        self._end_period()
        if self._time_limit is not None:
            return True, given
        affordable = (env_steps - self._env_steps_taken) / self._config.eval_episodes  # per episode
        least = LEAST_LENGTH_FACTOR * self._mean_length if given is None else 0
        is_due = affordable >= (least if least > MIN_LIMIT else 0) or env_steps >= self._config.env_steps
        if not is_due:
            self._warn_of_waiting()
        if given is not None:
            return is_due, given
        most = min(max(affordable, least, MIN_LIMIT), MAX_EPISODE_STEPS)
        return is_due, round(min(max(LENGTH_FACTOR * self._mean_length, MIN_LIMIT), most))

    def _end_period(self) -> None:
        total, count = peers.firsts(self._lengths.total), round(peers.firsts(self._lengths.num_values))
        self._mean_length, self._lengths = Sum(total, count).mean or self._mean_length, Sum()

    def _warn_of_waiting(self) -> None:
        if not self._has_warned:
            logger.warning(
                "%s has no time limit, and the evaluation of environment step %d waits, because evaluations would take "
                "more environment steps than training; smaller eval_episodes or eval_max_episode_steps make them "
                "shorter",
                self._config.env,
                self._topology.env_steps,
            )
            self._has_warned = True

    def _play(
        self, num_episodes: int, batch: int, limit: int | None, should_stop: Callable[[], bool]
    ) -> Episodes | None:
        episodes = self._topology.evaluate(num_episodes, batch, max_episode_steps=limit, should_stop=should_stop)
        if episodes is not None and episodes.returns.size:
            self._newest_length = float(episodes.lengths.sum()) / self._config.num_seeds
            self._env_steps_taken += self._newest_length
            self._newest = {
                "eval_at_env_steps": self._topology.env_steps,
                "eval_return_mean": float(episodes.returns.mean()),
                "eval_returns": episodes.returns.tolist(),
                "eval_num_different": int(episodes.num_different().sum()),
                "eval_num_cut": int(episodes.was_cut.sum()),
                "eval_episode_limit": limit,
            }
        return episodes

    def _reaches(self, episodes: Episodes, num_episodes: int) -> np.ndarray:
        """Returns whether the mean of `num_episodes` episodes of each seed is the return to stop at, `[seeds]` bool."""
        required = self._config.stop_return
        if required is None or episodes.returns.shape[1] < num_episodes:
            return np.zeros(len(episodes.returns), bool)
        return episodes.returns.mean(axis=1) >= required
