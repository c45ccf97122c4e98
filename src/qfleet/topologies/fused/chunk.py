"""One chunk of a fused run: what the host planned, what the program returned, and the record of progress in it."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jax import Array

from qfleet.config import TrainConfig
from qfleet.core.types import EnvSpec
from qfleet.runtime.records import Progress, Sum, make_progress
from qfleet.topologies.acting import not_finite
from qfleet.topologies.base import check_loss
from qfleet.topologies.fused.program import NO_BAD_STEP, ProgramStats
from qfleet.topologies.schedule import rows_per_iteration


class Chunk(NamedTuple):
    """What a chunk has done. Steps are those of one seed."""

    stats: ProgramStats
    """On the host, `[]` or `[seeds]` each."""
    exploration: Array | np.ndarray
    """Epsilon or temperature in the last row, `[]`."""
    num_iterations: int
    env_steps: int
    """Environment steps of the run after the chunk, over all lanes."""
    learner_steps: int
    """Learner steps of the run after the chunk."""
    new_env_steps: int
    new_learner_steps: int
    seconds: float
    """Wall time that it took."""


def progress_of(chunk: Chunk, config: TrainConfig, spec: EnvSpec) -> Progress:
    """Returns the record of a chunk.

    Args:
      chunk: the chunk, of all seeds of the run.
      config: the run's config.
      spec: of its environment.

    Raises:
      RunFailed: if a reward, an observation or the loss isn't finite.
    """
    stats = chunk.stats
    _check_finite(chunk, config, spec)
    num_episodes = int(np.sum(stats.num_episodes))
    progress = make_progress(
        env_steps=chunk.env_steps,
        learner_steps=chunk.learner_steps,
        train_seconds=chunk.seconds,
        new_env_steps=chunk.new_env_steps,
        new_learner_steps=chunk.new_learner_steps,
        episode_return=Sum(float(np.sum(stats.episode_return)), num_episodes),
        episode_length=Sum(float(np.sum(stats.episode_steps)), num_episodes),
        q_max=Sum(float(np.mean(stats.q_max)), chunk.num_iterations * rows_per_iteration(config.agent)),
        loss=Sum(float(np.mean(stats.losses.loss)), chunk.new_learner_steps),
        td_error=Sum(float(np.mean(stats.losses.td_error)), chunk.new_learner_steps),
        exploration=float(chunk.exploration),
    )
    if config.num_seeds == 1:
        return progress
    sums = zip(np.ravel(stats.episode_return).tolist(), np.ravel(stats.num_episodes).tolist(), strict=True)
    return dataclasses.replace(progress, seed_return_means=tuple(Sum(*each).mean for each in sums))


def _check_finite(chunk: Chunk, config: TrainConfig, spec: EnvSpec) -> None:
    bad_steps = np.atleast_1d(chunk.stats.bad_step)
    if np.any(bad_steps != NO_BAD_STEP):
        seed = int(np.argmax(bad_steps != NO_BAD_STEP))
        bad_step = int(bad_steps[seed])
        lane = bad_step % config.topology.num_envs
        env_steps_before = chunk.env_steps - chunk.new_env_steps
        raise not_finite(
            spec, f"at environment step {env_steps_before + bad_step} in lane {lane} of seed {config.seed + seed}"
        )
    check_loss(chunk.stats.losses.loss, chunk.learner_steps, config.agent)
