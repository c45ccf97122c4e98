"""Losses of the TD error, elementwise."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig


def squared_loss(td_error: Array) -> Array:
    """Returns half the squared TD error, so that its gradient is the error itself. Any shape."""
    return 0.5 * jnp.square(td_error)


def huber_loss(td_error: Array, delta: float) -> Array:
    """Returns the squared loss up to `delta` and its tangent beyond: the gradient is clipped to `[-delta, delta]`.

    Args:
      td_error: any shape, in units of discounted reward.
      delta: where it turns linear, in the same units.
    Source: Huber 1964; Mnih et al. 2015, Methods ("clip the error term").
    """
    # One branch or the other, never their sum: a large `delta` would cancel small gradients away.
    size = jnp.abs(td_error)
    return jnp.where(size <= delta, 0.5 * jnp.square(td_error), delta * (size - 0.5 * delta))


def make_loss(config: AgentConfig) -> Callable[[Array], Array]:
    """Returns the elementwise loss that `config` names."""
    if config.loss == "squared":
        return squared_loss
    return lambda td_error: huber_loss(td_error, config.huber_delta)
