"""The rate limiter: it says how many learner steps are due, and whether the actors must wait for the learner."""

from qfleet.config import ActorPool, TrainConfig

CHUNKS_AHEAD = 2
"""Chunks that each actor has been asked for at once. With two, an actor never waits for the next request."""

ROUNDS_AHEAD = 3
"""Rounds that the learner has been asked for at once. While it learns from one, the batches of the others are drawn."""


class RateLimiter:
    """Holds the replay ratio: the learner takes no step before it is due, and the actors don't run far ahead of it."""

    def __init__(self, config: TrainConfig, pool: ActorPool, num_batches: int) -> None:
        """Begins with an empty replay.

        Args:
          config: of the run.
          pool: the actors of the run.
          num_batches: learner steps of one round.
        """
        self._agent, self._pool, self._num_batches = config.agent, pool, num_batches
        self._end_env_steps = config.env_steps
        self.replay_starts_at = 0
        """Environment steps when the replay was last empty."""
        self._learner_steps_then = 0

    def begin_anew(self, env_steps: int, learner_steps: int) -> None:
        """Begins a new warm-up, because the replay is empty."""
        self.replay_starts_at, self._learner_steps_then = env_steps, learner_steps

    def resume(self, replay_starts_at: int, env_steps: int, learner_steps: int) -> None:
        """Goes on from where another run stopped. The learner owes no steps at that point."""
        self.begin_anew(replay_starts_at, 0)
        self._learner_steps_then = learner_steps - self.due(env_steps)

    def due(self, env_steps: int) -> int:
        """Returns how many learner steps, in total, are due after `env_steps` environment steps."""
        warmup = max(self._agent.warmup_env_steps, self._pool.num_lanes * (self._agent.rows_after_start + 1))
        learning = max(0, env_steps - self.replay_starts_at - warmup)
        return self._learner_steps_then + int(learning / self._agent.env_steps_per_learner_step)

    def is_far_ahead(self, env_steps: int, learner_steps: int) -> bool:
        """Returns whether the actors must wait for the learner before they go on from `env_steps` environment steps.

        The learner may be behind by a few rounds and by what all actors bring at once. Towards the end it may be behind
        by less, because nothing waits for it after the last environment step.
        """
        wave = CHUNKS_AHEAD * self._pool.num_lanes * self._pool.rows_per_chunk
        usual = ROUNDS_AHEAD * self._num_batches + int(wave / self._agent.env_steps_per_learner_step)
        left = self.due(self._end_env_steps) - self.due(env_steps)
        return self.due(env_steps) - learner_steps > max(self._num_batches, min(usual, left))
