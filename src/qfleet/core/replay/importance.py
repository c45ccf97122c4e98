"""Importance weights of a batch, after they were drawn."""

from typing import TypeVar

import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.replicas import ALONE, Replicas
from qfleet.core.types import Sequences, Transition

Samples = TypeVar("Samples", Transition, Sequences)


def are_normalised(config: AgentConfig) -> bool:
    """Returns whether the importance weights of each batch are divided by the greatest of them."""
    return config.importance_normalisation != "none" and config.replay == "prioritised"


def normalise_weights(
    batch: Samples, config: AgentConfig, replicas: Replicas = ALONE, weights: Array | None = None
) -> Samples:
    """Returns a batch whose importance weights are divided as `AgentConfig.importance_normalisation` says.

    Args:
      batch: `[batch, ...]`, the whole batch of one learner step, or this replica's share of it.
      config: the kind of replay, and how its weights are normalised.
      replicas: replicas that share the batch. All of them divide by the same weight, the greatest of the whole batch,
        so that the mean of their gradients is the gradient of the whole.
      weights: the weights of the whole batch, if this replica knows them already. Otherwise the replicas exchange their
        greatest ones.

    Source: Schaul et al. 2016, arXiv 1511.05952, section 3.4 and algorithm 1. They don't say whether the greatest
    weight is that of the batch or of the replay. As in Dopamine and Acme, it is that of the batch.
    """
    if not are_normalised(config):
        return batch
    greatest = jnp.max(replicas.gather(jnp.max(batch.weight)) if weights is None else weights)
    return batch._replace(weight=batch.weight / greatest)
