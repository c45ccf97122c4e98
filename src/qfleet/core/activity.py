"""The activity of a network's hidden units, and how many of them are dormant.

Source: Sokar et al. 2023, arXiv 2302.12902, definition 3.1. A unit's score is the mean absolute activation over a
distribution of observations, divided by the mean of these over its layer. It is dormant if the score is at most tau.
A unit of a convolution is a channel: its activation is the mean over pixels.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.types import Network, Params

TAU = 0.025
"""Score up to which a unit counts as dormant: it does a fortieth of the work of its layer's average unit."""

Activity = tuple[Array, ...]
"""The absolute activation of each unit, one array for each hidden layer; empty if the network doesn't show it."""


def make_with_activity(network: Network) -> Callable[[Params, Array], tuple[Array, Activity]]:
    """Returns `with_activity(params, obs) -> q, activity`, where each layer's activity is `[batch, units]`."""
    inner = network.with_activations
    if inner is None:
        return lambda params, obs: (network.apply(params, obs), ())

    def with_activity(params: Params, obs: Array) -> tuple[Array, Activity]:
        q, activations = inner(params, obs)
        return q, tuple(jnp.mean(jnp.abs(x), axis=tuple(range(1, x.ndim - 1))) for x in activations)

    return with_activity


def sum_where(activity: Activity, counts: Array) -> Activity:
    """Returns the sum over the observations that count, `[batch]` bool: each layer's `[batch, units]` to `[units]`."""
    return tuple(jnp.sum(jnp.where(counts[:, None], layer, 0.0), axis=0) for layer in activity)


def dormant_fraction(sums: tuple[np.ndarray, ...]) -> np.ndarray:
    """Returns the share of dormant units over all hidden layers, `[...]`; NaN without layers.

    Args:
      sums: for each layer `[..., units]`, the activity of each unit, summed over the same observations.
    """
    if not sums:
        return np.array(np.nan)
    dormant = [layer <= TAU * layer.mean(axis=-1, keepdims=True) for layer in sums]
    return np.asarray(np.concatenate(dormant, axis=-1).mean(axis=-1))
