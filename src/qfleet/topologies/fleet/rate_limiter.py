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
        agent, self._num_batches = config.agent, num_batches
        self._warmup = max(agent.warmup_env_steps, pool.num_lanes * (agent.rows_after_start + 1))
        self._ratio = agent.env_steps_per_learner_step
        wave = CHUNKS_AHEAD * pool.num_lanes * pool.rows_per_chunk
        self._usual_lead = ROUNDS_AHEAD * num_batches + int(wave / self._ratio)
        """Learner steps by which the learner may be behind: a few rounds, and what all actors bring at once."""
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
        learning = max(0, env_steps - self.replay_starts_at - self._warmup)
        return self._learner_steps_then + int(learning / self._ratio)

    def is_far_ahead(self, env_steps: int, learner_steps: int) -> bool:
        """Returns whether the actors must wait for the learner before they go on from `env_steps` environment steps.

        Towards the end the learner may be behind by less than usual, because nothing waits for it after the last
        environment step.
        """
        due = self.due(env_steps)
        left = self.due(self._end_env_steps) - due
        return due - learner_steps > max(self._num_batches, min(self._usual_lead, left))
