"""Elementwise losses of the TD error."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig


def squared_loss(td_error: Array) -> Array:
    """Returns half the squared TD error, of any shape. Its gradient is the TD error itself."""
    return 0.5 * jnp.square(td_error)


def huber_loss(td_error: Array, delta: float) -> Array:
    """Returns the squared loss up to `delta` and its tangent beyond, so the gradient stays in `[-delta, delta]`.

    Args:
      td_error: any shape, in units of discounted reward.
      delta: the error at which the loss becomes linear, in the same units.
    Source: Huber 1964; Mnih et al. 2015, Methods ("clip the error term").
    """
    # It is one branch or the other, never their sum. With a large `delta`, a sum would round small gradients away.
    size = jnp.abs(td_error)
    return jnp.where(size <= delta, 0.5 * jnp.square(td_error), delta * (size - 0.5 * delta))


def make_loss(config: AgentConfig) -> Callable[[Array], Array]:
    """Returns the elementwise loss that `config` names."""
    if config.loss == "squared":
        return squared_loss
    return lambda td_error: huber_loss(td_error, config.huber_delta)
