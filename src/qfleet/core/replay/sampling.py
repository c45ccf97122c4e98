"""Transitions from rows: n-step returns and frame stacks, put together when a batch is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.replay.ring import NO_STEP, TERMINATED, Ring, later_slot, of_segment, take
from qfleet.core.replicas import Replicas

MAX_DRAWS = 64
"""Rounds of rejection before a draw is given up (weight 0). At most every second row holds no step: 2**-64."""


def first_row(ring: Ring, frame_stack: int) -> Array:
    """Returns each segment's oldest row whose frame stack is whole, `[segments]` int32: once it is full, what the
    oldest rows would be stacked on has been overwritten.
    """
    oldest = jnp.where(ring.size == ring.num_rows, ring.cursor, 0)
    missing = jnp.where(ring.size == ring.num_rows, frame_stack - 1, 0)
    return (oldest + missing) % ring.num_rows


def num_first_rows(ring: Ring, n_step: int, frame_stack: int) -> Array:
    """Returns how many rows of each segment, from `first_row` on, have both their stack and their n-step window."""
    missing = jnp.where(ring.size == ring.num_rows, frame_stack - 1, 0)
    return jnp.maximum(ring.size - n_step - missing, 0)


def draw_uniformly(
    ring: Ring, key: Array, batch_size: int, n_step: int, frame_stack: int, replicas: Replicas
) -> tuple[Array, Array, Array]:
    """Returns slots at which a transition starts, each of any replica's as likely as any other, and weights of 1.

    Slots that hold no step are drawn again.

    Returns:
      Slot, `[batch]` uint32; whether it is in this replica's ring, where it isn't meaningless otherwise, `[batch]`
      bool; weight, `[batch]` float32, 0 where `MAX_DRAWS` found no step.
    """
    num_rows, num_lanes = jnp.uint32(ring.num_rows), jnp.uint32(ring.num_lanes)
    num_together = jnp.uint32(ring.lanes_per_segment)
    first = first_row(ring, frame_stack).astype(jnp.uint32)
    # Laid end to end, segment after segment; one slot at least, to have something to look at.
    ends = jnp.cumsum(num_first_rows(ring, n_step, frame_stack).astype(jnp.uint32) * num_together)
    num_first = jnp.maximum(ends[-1], 1)
    starts = jnp.concatenate([jnp.zeros(1, jnp.uint32), ends[:-1]])

    def draw(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        attempt, slot, is_mine, is_step = carry
        # The remainder favours some slots by num_slots / 2**32; a float would have too few bits for 1M of them.
        bits = jax.random.bits(jax.random.fold_in(key, attempt), (batch_size,), jnp.uint32)
        place = bits % (num_first * jnp.uint32(replicas.size))
        offset = place % num_first
        segment = jnp.sum(ends[:-1] <= offset[:, None], axis=1, dtype=jnp.uint32)
        offset -= starts[segment]
        row = first[segment] + offset // num_together
        row = jnp.where(row >= num_rows, row - num_rows, row)
        drawn = row * num_lanes + segment * num_together + offset % num_together
        slot = jnp.where(is_step, slot, drawn)
        is_mine = jnp.where(is_step, is_mine, place // num_first == replicas.rank())
        holds_step = is_mine & (take(ring.rows.outcome, slot) != NO_STEP)
        return attempt + 1, slot, is_mine, replicas.sum(holds_step.astype(jnp.uint8)) > 0

    def has_rejected(carry: tuple[Array, Array, Array, Array]) -> Array:
        attempt, _, _, is_step = carry
        return (attempt < MAX_DRAWS) & ~jnp.all(is_step)

    nobody = jnp.zeros(batch_size, bool)
    _, slot, is_mine, is_step = jax.lax.while_loop(
        has_rejected, draw, (jnp.int32(0), jnp.zeros(batch_size, jnp.uint32), nobody, nobody)
    )
    return slot, is_mine, is_step.astype(jnp.float32)


def n_step_returns(ring: Ring, slot: Array, n_step: int, discount: float) -> tuple[Array, Array, Array]:
    """Returns the return, the discount and the number of steps of the transition that starts at each slot.

    Args:
      ring: the ring.
      slot: `[batch]` uint32, with `n_step` later rows in the ring.
      n_step: rewards summed, fewer where the episode ends before.
      discount: per environment step.

    Returns:
      Sum of the k <= n rewards, each discounted to the first row, `[batch]` float32; discount**k, or 0 if the
      episode terminated on the way, `[batch]` float32; and k, `[batch]` int32.
    Source: Sutton 1988; Hessel et al. 2018, arXiv 1710.02298, section "Multi-step learning".
    """
    window = later_slot(ring, slot[:, None], np.arange(n_step))
    outcome, reward = take(ring.rows.outcome, window), take(ring.rows.reward, window)
    has_ended = jnp.cumsum(outcome != 0, axis=1) > 0
    is_within = jnp.concatenate([jnp.ones_like(has_ended[:, :1]), ~has_ended[:, :-1]], axis=1)
    n_step_return = jnp.sum(reward * is_within * discount ** jnp.arange(n_step, dtype=jnp.float32), axis=1)
    num_steps = jnp.sum(is_within, axis=1, dtype=jnp.int32)
    terminated = jnp.any((outcome == TERMINATED) & is_within, axis=1)
    return n_step_return, jnp.where(terminated, 0.0, discount ** num_steps.astype(jnp.float32)), num_steps


def stacked_observations(ring: Ring, slot: Array, frame_stack: int) -> Array:
    """Returns what the agent saw, or would have seen, at each slot: the newest frames, oldest first.

    Frames from before the episode's start are zeros, as in the agent's own eyes (`qfleet.core.frame_stack`).

    Args:
      ring: the ring.
      slot: `[batch]` uint32, with `frame_stack - 1` earlier rows of the same episode in the ring, where it is that old.
      frame_stack: frames seen at once.

    Returns:
      `[batch, *observation_shape]`, and one more axis of `frame_stack` where that is above 1.
    """
    if frame_stack == 1:
        return take(ring.rows.obs, slot)
    age = np.arange(frame_stack - 1, -1, -1)
    window = later_slot(ring, slot[:, None], ring.num_rows - age)
    frames = take(ring.rows.obs, window)
    # A final observation still belongs to its episode, so only rows before the newest count as an end before it.
    ends = take(ring.rows.outcome, window[:, :-1]) == NO_STEP
    is_full = of_segment(ring, ring.size, slot[:, None]) == ring.num_rows
    exists = is_full | (window[:, :-1] < slot[:, None])
    is_older_episode = jnp.cumsum((ends | ~exists)[:, ::-1], axis=1)[:, ::-1] > 0
    is_older_episode = jnp.concatenate([is_older_episode, jnp.zeros_like(ends[:, :1])], axis=1)
    mask = is_older_episode.reshape(is_older_episode.shape + (1,) * (frames.ndim - 2))
    return jnp.moveaxis(jnp.where(mask, jnp.zeros_like(frames), frames), 1, -1)
