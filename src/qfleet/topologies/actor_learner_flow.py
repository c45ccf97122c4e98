"""What a fleet's director decides, without regard to who carries it out: how many steps are due, and who draws what."""

import time

import numpy as np

from qfleet.config import ActorLearnerConfig, TrainConfig

CHUNKS_AHEAD = 2
"""That each actor has been asked for, so that it never waits for the next request."""

ROUNDS_AHEAD = 3
"""That the learner has been asked for: one it learns from, others whose batches are drawn meanwhile."""


class Limiter:
    """Holds the replay ratio: the learner never runs ahead of what is due, nor the actors far ahead of the learner."""

    def __init__(self, config: TrainConfig, num_batches: int) -> None:
        """Begins with an empty replay.

        Args:
          config: of the run.
          num_batches: learner steps of one round.
        """
        assert isinstance(config.topology, ActorLearnerConfig)
        self._agent, self._topology, self._num_batches = config.agent, config.topology, num_batches
        self._end_env_steps = config.env_steps
        self.replay_starts_at = 0
        """Environment steps when the replay was last empty."""
        self._learner_steps_then = 0

    def begin_anew(self, env_steps: int, learner_steps: int) -> None:
        """Has a new warm-up begin: the replay is empty."""
        self.replay_starts_at, self._learner_steps_then = env_steps, learner_steps

    def go_on(self, replay_starts_at: int, env_steps: int, learner_steps: int) -> None:
        """Goes on from where a run was; the learner owes nothing there."""
        self.begin_anew(replay_starts_at, 0)
        self._learner_steps_then = learner_steps - self.due(env_steps)

    def due(self, env_steps: int) -> int:
        """Returns how many learner steps so many environment steps are to have brought, in total."""
        warmup = max(self._agent.warmup_env_steps, self._topology.num_envs * (self._agent.n_step + 1))
        learning = max(0, env_steps - self.replay_starts_at - warmup)
        return self._learner_steps_then + int(learning / self._agent.env_steps_per_learner_step)

    def is_far_ahead(self, env_steps: int, learner_steps: int) -> bool:
        """Returns whether the actors must wait for the learner before they go on from so many environment steps.

        It may be behind by a few rounds and what all actors bring at once; by less towards the end, where nobody waits
        for it any more.
        """
        wave = CHUNKS_AHEAD * self._topology.num_envs * self._topology.rows_per_chunk
        usual = ROUNDS_AHEAD * self._num_batches + int(wave / self._agent.env_steps_per_learner_step)
        left = self.due(self._end_env_steps) - self.due(env_steps)
        return self.due(env_steps) - learner_steps > max(self._num_batches, min(usual, left))


class Tally:
    """What happened since the last record."""

    def __init__(self, num_actors: int) -> None:
        self.started_at = time.perf_counter()
        self.seconds = 0.0
        """That it covers."""
        self.end = (0, 0)
        """Environment steps and learner steps in total, then."""
        self.env_steps = self.learner_steps = self.num_failures = 0
        self.actor_env_steps = np.zeros(num_actors, np.int64)
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.q_mean: list[float] = []
        self.staleness: list[int] = []
        self.loss = self.td_error = 0.0
        self.received_bytes = 0
        self.busy_seconds = {"actors": 0.0, "shards": 0.0, "learner": 0.0}


def deal(size: int, priorities: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many of `size` draws fall to each shard, `[shards]`, and the share of the whole that each has.

    As many as its share of the priorities says, rounded up or down at random: on average exactly so many.
    """
    shares = priorities / priorities.sum()
    ends = np.floor(np.cumsum(shares) * size + random.random()).astype(np.int64)
    ends[-1] = size
    return np.diff(np.minimum(ends, size), prepend=0), shares
