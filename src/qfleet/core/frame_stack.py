"""What an agent sees: the newest frames of each lane, stacked along a last axis."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


def stack_to_storage_layout(to_storage_layout: Callable[[Array], Array], obs: Array, frame_stack: int) -> Array:
    """Returns stacks of frames as stacks of stored frames.

    Args:
      to_storage_layout: of the network.
      obs: `[batch, *agent_observation_shape]`.
      frame_stack: frames of each; 1 has no axis.
    """
    return (
        to_storage_layout(obs) if frame_stack == 1 else jnp.moveaxis(to_storage_layout(jnp.moveaxis(obs, -1, 1)), 1, -1)
    )


def init_view(obs: Array, frame_stack: int) -> Array:
    """Returns what the agent sees of each lane's first observation: zeros, then it.

    Args:
      obs: `[lanes, *observation_shape]`, as the network's `to_storage_layout` keeps them.
      frame_stack: frames seen at once; 1 adds no axis.

    Returns:
      `[lanes, *observation_shape]`, and one more axis of `frame_stack` where that is above 1.
    """
    if frame_stack == 1:
        return obs
    empty = jnp.zeros((*obs.shape, frame_stack), obs.dtype)
    return empty.at[..., -1].set(obs)


def push_frame(view: Array, obs: Array, is_first: Array, frame_stack: int) -> Array:
    """Returns the view after `obs`: the oldest frame leaves; nothing crosses an episode's start.

    Args:
      view: as `init_view` returns it.
      obs: `[lanes, *observation_shape]`, the newest observations.
      is_first: `[lanes]` bool, `obs` starts an episode.
      frame_stack: frames seen at once.
    """
    if frame_stack == 1:
        return obs
    is_first = is_first.reshape(is_first.shape + (1,) * (view.ndim - 1))
    pushed = jnp.concatenate([view[..., 1:], obs[..., None]], axis=-1)
    return jnp.where(is_first, init_view(obs, frame_stack), pushed)
