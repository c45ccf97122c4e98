"""Transitions from rows: n-step returns and frame stacks, assembled when a batch is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.replay.ring import NO_STEP, TERMINATED, Ring, later_slot, of_segment, take
from qfleet.core.replay.window import Window
from qfleet.core.replicas import Replicas

MAX_DRAWS = 64
"""Rounds of rejection before a draw is given up, with weight 0. Usually at most every second row holds no step, so this
happens to a draw with a probability of 2**-64."""

DRAWS_PER_MESSAGE = 4
"""Rounds of rejection for which replicas ask each other at once whether a draw hit a step. A divisor of `MAX_DRAWS`."""


def first_row(ring: Ring, window: Window) -> Array:
    """Returns each segment's oldest row at which a sample may start, `[segments]` int32.

    Once a segment is full, the frames below its oldest rows have been overwritten.
    """
    return (_first_with_frames(ring, window) + _num_skipped(ring, window)) % ring.num_rows


def num_starts(ring: Ring, window: Window) -> Array:
    """Returns at how many rows of each segment, from `first_row` on, a sample may start: `[segments]` int32.

    They have complete windows and frame stacks, and lie `window.period` rows apart.
    """
    missing = jnp.where(ring.size == ring.num_rows, window.frame_stack - 1, 0)
    complete = jnp.maximum(ring.size - window.num_after - missing, 0)
    if window.period == 1:
        return complete
    return jnp.maximum(complete - _num_skipped(ring, window) + window.period - 1, 0) // window.period


def _first_with_frames(ring: Ring, window: Window) -> Array:
    oldest = jnp.where(ring.size == ring.num_rows, ring.cursor, 0)
    missing = jnp.where(ring.size == ring.num_rows, window.frame_stack - 1, 0)
    return (oldest + missing) % ring.num_rows


def _num_skipped(ring: Ring, window: Window) -> Array | int:
    """Returns the number of rows from each segment's oldest row with all frames to the next possible start."""
    return 0 if window.period == 1 else -_first_with_frames(ring, window) % window.period


def draw_uniformly(
    ring: Ring, key: Array, batch_size: int, window: Window, replicas: Replicas
) -> tuple[Array, Array, Array]:
    """Returns slots at which a sample starts. All such slots, of all replicas, are equally likely.

    A slot is drawn again if none of the rows that would be learned from holds a step.

    Args:
      ring: the ring of this replica.
      key: the key of this batch, the same for all replicas.
      batch_size: number of draws, over all replicas.
      window: the rows of a sample.
      replicas: the replicas that draw together.

    Returns:
      The slots, `[batch]` uint32, which mean nothing if they are in another replica's ring; whether each is in this
      replica's ring, `[batch]` bool; and the weights, `[batch]` float32, which are 1, or 0 if `MAX_DRAWS` draws found
      no step.
    """
    num_rows, num_lanes = jnp.uint32(ring.num_rows), jnp.uint32(ring.num_lanes)
    num_together = jnp.uint32(ring.lanes_per_segment)
    first = first_row(ring, window).astype(jnp.uint32)
    # The slots are laid end to end, segment after segment. There is at least one, so that the division is defined.
    ends = jnp.cumsum(num_starts(ring, window).astype(jnp.uint32) * num_together)
    num_first = jnp.maximum(ends[-1], 1)
    starts = jnp.concatenate([jnp.zeros(1, jnp.uint32), ends[:-1]])

    num_at_once = 1 if replicas.size == 1 else DRAWS_PER_MESSAGE

    def candidates(attempt: Array) -> tuple[Array, Array, Array]:
        # The remainder favours some slots by num_slots / 2**32. A float would have too few bits for 1M slots.
        bits = jax.random.bits(jax.random.fold_in(key, attempt), (batch_size,), jnp.uint32)
        place = bits % (num_first * jnp.uint32(replicas.size))
        offset = place % num_first
        segment = jnp.sum(ends[:-1] <= offset[:, None], axis=1, dtype=jnp.uint32)
        offset -= starts[segment]
        row = first[segment] + _in_rows(offset // num_together, window)
        row = jnp.where(row >= num_rows, row - num_rows, row)
        slot = row * num_lanes + segment * num_together + offset % num_together
        is_mine = place // num_first == replicas.rank()
        return slot, is_mine, is_mine & _holds_a_step(ring, slot, window)

    def draw(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        attempt, slot, is_mine, is_step = carry
        tried = [candidates(attempt + i) for i in range(num_at_once)]
        hold_step = replicas.sum(jnp.stack([holds_step for _, _, holds_step in tried]).astype(jnp.uint8)) > 0
        for (new_slot, is_new_mine, _), holds_step in zip(tried, hold_step, strict=True):
            slot = jnp.where(is_step, slot, new_slot)
            is_mine = jnp.where(is_step, is_mine, is_new_mine)
            is_step |= holds_step
        return attempt + num_at_once, slot, is_mine, is_step

    def has_rejected(carry: tuple[Array, Array, Array, Array]) -> Array:
        attempt, _, _, is_step = carry
        return (attempt < MAX_DRAWS) & ~jnp.all(is_step)

    none_yet = jnp.zeros(batch_size, bool)
    _, slot, is_mine, is_step = jax.lax.while_loop(
        has_rejected, draw, (jnp.int32(0), jnp.zeros(batch_size, jnp.uint32), none_yet, none_yet)
    )
    return slot, is_mine, is_step.astype(jnp.float32)


def _in_rows(starts: Array, window: Window) -> Array:
    return starts if window.period == 1 else starts * jnp.uint32(window.period)


def _holds_a_step(ring: Ring, slot: Array, window: Window) -> Array:
    """Returns whether any of the rows that are learned from holds a step, for the window at each slot."""
    if window.num_learned == 1 and window.first_learned == 0:
        return take(ring.rows.outcome, slot) != NO_STEP
    learned = window.first_learned + np.arange(window.num_learned)
    return jnp.any(take(ring.rows.outcome, later_slot(ring, slot[:, None], learned)) != NO_STEP, axis=1)


def n_step_returns(ring: Ring, slot: Array, n_step: int, discount: float | Array) -> tuple[Array, Array, Array]:
    """Returns the return, the discount and the number of steps of the transition that starts at each slot.

    Args:
      ring: the ring.
      slot: `[batch]` uint32. The ring must hold the `n_step` rows after each of them.
      n_step: number of rewards summed, or fewer if the episode ends earlier.
      discount: per environment step.

    Returns:
      The sum of the k <= n rewards, each discounted to the first row, `[batch]` float32; discount**k, or 0 if the
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
    """Returns what the agent saw, or would have seen, at each slot: its newest frames, oldest first.

    Frames from before the episode's start are zeros, as they were for the agent (`qfleet.core.frame_stack`).

    Args:
      ring: the ring.
      slot: `[batch]` uint32. The ring must hold the `frame_stack - 1` rows before each of them, as far as they belong
        to the same episode.
      frame_stack: frames seen at once.

    Returns:
      `[batch, *observation_shape]`, with one more axis of `frame_stack` if that is above 1.
    """
    if frame_stack == 1:
        return take(ring.rows.obs, slot)
    age = np.arange(frame_stack - 1, -1, -1)
    window = later_slot(ring, slot[:, None], ring.num_rows - age)
    frames = take(ring.rows.obs, window)
    # A final observation still belongs to its episode, so only an end in a row before the newest one separates frames.
    ends = take(ring.rows.outcome, window[:, :-1]) == NO_STEP
    is_full = of_segment(ring, ring.size, slot[:, None]) == ring.num_rows
    exists = is_full | (window[:, :-1] < slot[:, None])
    is_older_episode = jnp.cumsum((ends | ~exists)[:, ::-1], axis=1)[:, ::-1] > 0
    is_older_episode = jnp.concatenate([is_older_episode, jnp.zeros_like(ends[:, :1])], axis=1)
    mask = is_older_episode.reshape(is_older_episode.shape + (1,) * (frames.ndim - 2))
    return jnp.moveaxis(jnp.where(mask, jnp.zeros_like(frames), frames), 1, -1)
