"""Sequences from rows, for networks with a memory: assembled when a batch is drawn, as transitions are.

Starts lie `sequence_period` rows apart. So a sum tree has one leaf above 0 for so many rows, and sequences that overlap
by almost all of their rows don't each have a priority of their own. Sequences may hold the end of an episode and the
start of the next: the memory is reset there, and no return or bootstrap crosses it.

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning", section 2.3. Their
sequences don't cross the end of an episode. Ours are followed by `n_step` rows, so that each learned row has its whole
n-step return.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.replay import sampling
from qfleet.core.replay.ring import NO_STEP, Ring, later_slot, take
from qfleet.core.types import Sequences


def sequences(
    ring: Ring, slot: Array, weight: Array, config: AgentConfig, discount: float | Array, frame_stack: int
) -> Sequences:
    """Returns the sequences that start at these slots.

    Args:
      ring: the ring. It must hold the `config.rows_after_start` rows after each slot.
      slot: `[batch]` uint32.
      weight: `[batch]` float32, the importance weights.
      config: the lengths of burn-in, sequence and return.
      discount: per environment step.
      frame_stack: frames seen at once.
    """
    batch_size, num_learned = len(slot), config.sequence_length
    rows = later_slot(ring, slot[:, None], np.arange(config.rows_after_start + 1))
    learned = rows[:, config.burn_in : config.burn_in + num_learned]
    outcome = take(ring.rows.outcome, rows)
    reward, discount_t, num_steps = (
        x.reshape(batch_size, num_learned)
        for x in sampling.n_step_returns(ring, learned.reshape(-1), config.n_step, discount)
    )
    obs = sampling.stacked_observations(ring, rows.reshape(-1), frame_stack)
    follows_an_end = outcome[:, :-1] == NO_STEP
    return Sequences(
        obs=obs.reshape(*rows.shape, *obs.shape[1:]),
        is_first=jnp.concatenate([jnp.zeros_like(follows_an_end[:, :1]), follows_an_end], axis=1),
        carry=take(ring.rows.carry, slot),
        action=take(ring.rows.action, learned),
        reward=reward,
        discount=discount_t,
        num_steps=num_steps,
        is_step=outcome[:, config.burn_in : config.burn_in + num_learned] != NO_STEP,
        weight=weight,
    )
