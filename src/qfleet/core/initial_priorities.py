"""Initial priorities: the TD errors that an actor computes for its own steps, before a learner has seen them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.replay import CONTINUED, NO_STEP, TRUNCATED, sealed_outcomes
from qfleet.core.rescaling import rescale, unscale


class ValuedRows(NamedTuple):
    """Consecutive rows, `[rows, lanes]`, with the values that the actor gave them."""

    reward: Array
    """Float32."""
    outcome: Array
    """`Row.outcome`, uint8."""
    q_taken: Array
    """Float32, the value of the action that was taken."""
    q_max: Array
    """Float32, the greatest action value of the observation."""


def padding_rows(num_rows: int, num_lanes: int) -> ValuedRows:
    """Returns padding to put before an actor's first rows. It starts no transition, and its TD errors are NaN."""
    shape = (num_rows, num_lanes)
    unknown = jnp.full(shape, jnp.nan)
    return ValuedRows(jnp.zeros(shape), jnp.full(shape, NO_STEP), unknown, unknown)


def initial_td_errors(rows: ValuedRows, n_step: int, discount: float, *, is_rescaled: bool = False) -> Array:
    """Returns the TD error, by the actor's own values, of the transition that starts at each row except the last n.

    Args:
      rows: `[n_step + rows, lanes]`.
      n_step: number of rewards summed, or fewer if the episode ends earlier.
      discount: per environment step.
      is_rescaled: whether values are `rescale` of returns.

    Returns:
      `[rows, lanes]` float32. Element i belongs to the transition that row i starts and row `n_step + i` completes. It
      means nothing if row i starts no transition.
    Source: Horgan et al. 2018, arXiv 1803.00933, section 3 and algorithm 1.
    """
    num_rows = len(rows.reward) - n_step
    outcome = sealed_outcomes(rows.outcome)
    q_max = unscale(rows.q_max) if is_rescaled else rows.q_max
    returns, factor = jnp.zeros_like(rows.reward[:num_rows]), 1.0
    is_under_way = jnp.ones_like(returns, bool)
    for i in range(n_step):
        window, next_rows = np.s_[i : i + num_rows], np.s_[i + 1 : i + 1 + num_rows]
        returns += jnp.where(is_under_way, factor * rows.reward[window], 0.0)
        factor *= discount
        is_cut = is_under_way & (outcome[window] == TRUNCATED)
        returns += jnp.where(is_cut, factor * q_max[next_rows], 0.0)
        is_under_way &= outcome[window] == CONTINUED
    returns += jnp.where(is_under_way, factor * q_max[n_step:], 0.0)
    return (rescale(returns) if is_rescaled else returns) - rows.q_taken[:num_rows]
