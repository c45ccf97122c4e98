"""The view of an agent: the newest frames of each lane, stacked along a last axis."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


def stack_to_storage_layout(to_storage_layout: Callable[[Array], Array], obs: Array, frame_stack: int) -> Array:
    """Returns stacks of frames, with each frame in the layout in which it is stored.

    Args:
      to_storage_layout: the network's `to_storage_layout`.
      obs: `[batch, *agent_observation_shape]`.
      frame_stack: frames of each stack; 1 has no axis.
    """
    if frame_stack == 1:
        return to_storage_layout(obs)
    return jnp.moveaxis(to_storage_layout(jnp.moveaxis(obs, -1, 1)), 1, -1)


def init_view(obs: Array, frame_stack: int) -> Array:
    """Returns the view of each lane's first observation: frames of zeros, then the observation.

    Args:
      obs: `[lanes, *observation_shape]`, as the network's `to_storage_layout` returns them.
      frame_stack: frames seen at once; 1 adds no axis.

    Returns:
      `[lanes, *observation_shape]`, with one more axis of `frame_stack` if that is above 1.
    """
    if frame_stack == 1:
        return obs
    empty = jnp.zeros((*obs.shape, frame_stack), obs.dtype)
    return empty.at[..., -1].set(obs)


def push_frame(view: Array, obs: Array, is_first: Array, frame_stack: int) -> Array:
    """Returns the view after `obs`, without its oldest frame. No frame crosses the start of an episode.

    Args:
      view: as `init_view` returns it.
      obs: `[lanes, *observation_shape]`, the newest observations.
      is_first: `[lanes]` bool, whether `obs` starts an episode.
      frame_stack: frames seen at once.

    Returns:
      The same shape as `view`.
    """
    if frame_stack == 1:
        return obs
    is_first = is_first.reshape(is_first.shape + (1,) * (view.ndim - 1))
    pushed = jnp.concatenate([view[..., 1:], obs[..., None]], axis=-1)
    return jnp.where(is_first, init_view(obs, frame_stack), pushed)
