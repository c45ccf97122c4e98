"""How many learner steps are due, and who waits for whom, where acting and learning go on by themselves."""

from qfleet.config import RayTopologyConfig, TrainConfig

CHUNKS_AHEAD = 2
"""That each actor has been asked for, so that it never waits for the next request."""

ROUNDS_AHEAD = 3
"""That the learner has been asked for: one it learns from, others whose batches are drawn meanwhile."""


class RateLimiter:
    """Holds the replay ratio: the learner never runs ahead of what is due, nor the actors far ahead of the learner."""

    def __init__(self, config: TrainConfig, num_batches: int) -> None:
        """Begins with an empty replay.

        Args:
          config: of the run.
          num_batches: learner steps of one round.
        """
        self._agent, self._num_batches = config.agent, num_batches
        self._pool = config.topology_as(RayTopologyConfig).actor_pool
        self._end_env_steps = config.env_steps
        self.replay_starts_at = 0
        """Environment steps when the replay was last empty."""
        self._learner_steps_then = 0

    def begin_anew(self, env_steps: int, learner_steps: int) -> None:
        """Has a new warm-up begin: the replay is empty."""
        self.replay_starts_at, self._learner_steps_then = env_steps, learner_steps

    def resume(self, replay_starts_at: int, env_steps: int, learner_steps: int) -> None:
        """Goes on from where a run was; the learner owes nothing there."""
        self.begin_anew(replay_starts_at, 0)
        self._learner_steps_then = learner_steps - self.due(env_steps)

    def due(self, env_steps: int) -> int:
        """Returns how many learner steps so many environment steps are to have brought, in total."""
        warmup = max(self._agent.warmup_env_steps, self._pool.num_lanes * (self._agent.n_step + 1))
        learning = max(0, env_steps - self.replay_starts_at - warmup)
        return self._learner_steps_then + int(learning / self._agent.env_steps_per_learner_step)

    def is_far_ahead(self, env_steps: int, learner_steps: int) -> bool:
        """Returns whether the actors must wait for the learner before they go on from so many environment steps.

        It may be behind by a few rounds and what all actors bring at once; by less towards the end, where nobody waits
        for it any more.
        """
        wave = CHUNKS_AHEAD * self._pool.num_lanes * self._pool.rows_per_chunk
        usual = ROUNDS_AHEAD * self._num_batches + int(wave / self._agent.env_steps_per_learner_step)
        left = self.due(self._end_env_steps) - self.due(env_steps)
        return self.due(env_steps) - learner_steps > max(self._num_batches, min(usual, left))
