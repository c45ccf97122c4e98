"""What a run notes about itself as it goes. Checkpoints keep part of it, and summary.json tells it at the end."""

import logging
import time
from typing import Any

from qfleet.config import TrainConfig
from qfleet.config.own_parts import own_parts
from qfleet.runtime.process import peak_rss_bytes, seconds_since_process_start
from qfleet.runtime.records import Progress
from qfleet.runtime.stopwatch import TimeShares
from qfleet.topologies.base import Topology
from qfleet.training.outcome import DivergenceCheck, Evaluations, Speed

logger = logging.getLogger("qfleet")


class RunAccount:
    """The counts, times, evaluations and warnings of a run."""

    def __init__(self, config: TrainConfig) -> None:
        """Begins to measure the time of the run."""
        self.began = time.monotonic()
        self.decided_at = self.began
        """Time at which it was last decided whether the run goes on, on the monotonic clock."""
        self.compile_seconds = 0.0
        self.solved_at: list[int | None] = [None] * config.num_seeds
        """Environment step at which each seed reached the return to stop at; None if it hasn't."""
        self.evaluated_at = 0
        """Environment steps of the newest evaluation."""
        self.evaluations = Evaluations()
        self.num_env_failures = 0
        self._config = config
        self._process_age = seconds_since_process_start()
        self._num_episodes = 0
        self._speed = Speed()
        self._divergence = DivergenceCheck(config.agent.discount)
        self._time_shares = TimeShares(config.topology.num_envs)
        self._warnings: dict[str, str] = {}  # by what they are about

    @property
    def is_solved(self) -> bool:
        """Whether all seeds have reached the return to stop at."""
        return None not in self.solved_at

    def add(self, progress: Progress) -> None:
        """Adds the training of a record."""
        self._speed.add(progress)
        self._time_shares.add(progress)
        self.num_env_failures += progress.num_env_failures
        self._num_episodes += progress.num_episodes

    def check_divergence(self, progress: Progress) -> None:
        """Warns if the values of a record have left all bounds. Its evaluation counts, too."""
        if diverged := self._divergence.check(progress):
            self.warn("divergence", diverged)

    def warn(self, about: str, text: str) -> None:
        """Logs a warning, and notes it for the summary; only once about the same thing."""
        if about not in self._warnings:
            self._warnings[about] = text
            logger.warning("%s", text)

    @property
    def saved(self) -> dict[str, Any]:
        """What the metadata of a checkpoint keep, for `restore`."""
        return {
            "solved_at": self.solved_at,
            "stop_return": self._config.stop_return,
            "evaluated_at": self.evaluated_at,
            "best_evaluation": self.evaluations.saved(),
            "num_episodes": self._num_episodes,
            "own_parts": own_parts(self._config.agent),
        }

    def restore(self, metadata: dict[str, Any], stop_return: float | None) -> None:
        """Goes on from the metadata of a checkpoint.

        Args:
          metadata: the metadata, whose counters say how far the run had come.
          stop_return: the return to stop at in the config that the run began with.
        """
        env_steps, period = metadata["counters"]["env_steps"], self._config.eval_period_env_steps
        self.evaluated_at = metadata.get("evaluated_at", env_steps // period * period)
        self._num_episodes = metadata.get("num_episodes", 0)
        self.evaluations.restore(metadata.get("best_evaluation"))
        if self._config.stop_return == metadata.get("stop_return", stop_return):
            self.solved_at = metadata["solved_at"]

    def summary(self, stopped: str, topology: Topology) -> dict[str, Any]:
        """Returns the entries of summary.json that tell of the run as a whole.

        Args:
          stopped: why the run has ended.
          topology: whose steps are counted.
        """
        config, speed = self._config, self._speed
        return {
            "preset": config.preset,
            "own_parts": own_parts(config.agent),
            "topology": config.topology.name,
            "seed": config.seed,
            "num_seeds": config.num_seeds,
            "stopped": stopped,
            "env_steps": topology.env_steps,
            "learner_steps": topology.learner_steps,
            "num_episodes": self._num_episodes,
            "env_steps_between_episodes": self._num_episodes // config.num_seeds,
            "solved_at_env_steps": self.solved_at,
            "wall_seconds": self.decided_at - self.began,
            "process_age_seconds": self._process_age,
            "compile_seconds": self.compile_seconds,
            "env_steps_per_second": speed.per_second(speed.env_steps),
            "learner_steps_per_second": speed.per_second(speed.learner_steps),
            **self._time_shares.summary(),
            **self.evaluations.summary(),
            "num_env_failures": self.num_env_failures,
            "peak_rss_bytes": peak_rss_bytes(),
            "warnings": list(self._warnings.values()),
            **topology.facts,
        }
