"""Transitions from rows: n-step returns and frame stacks, put together when a batch is drawn."""

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.core.replay.ring import NO_STEP, TERMINATED, Ring

MAX_DRAWS = 64
"""Rounds of rejection before a draw is given up (weight 0). At most every second row holds no step: 2**-64."""


def first_row(ring: Ring, frame_stack: int) -> Array:
    """Returns the oldest row whose frame stack is whole, `[]` int32: once the ring is full, what the oldest rows
    would be stacked on has been overwritten.
    """
    oldest = jnp.where(ring.size == ring.num_rows, ring.cursor, 0)
    missing = jnp.where(ring.size == ring.num_rows, frame_stack - 1, 0)
    return (oldest + missing) % ring.num_rows


def num_first_rows(ring: Ring, n_step: int, frame_stack: int) -> Array:
    """Returns how many rows, from `first_row` on, have both their stack and their n-step window in the ring."""
    missing = jnp.where(ring.size == ring.num_rows, frame_stack - 1, 0)
    return jnp.maximum(ring.size - n_step - missing, 0)


def draw_uniformly(
    ring: Ring, key: Array, batch_size: int, n_step: int, frame_stack: int
) -> tuple[Array, Array, Array]:
    """Returns rows and lanes at which a transition starts, each such place as likely as any other, and weights of 1.

    Rows that hold no step are drawn again.

    Returns:
      Row, `[batch]` int32; lane, `[batch]` int32; weight, `[batch]` float32, 0 where `MAX_DRAWS` found no step.
    """
    first = first_row(ring, frame_stack)
    num_first = jnp.maximum(num_first_rows(ring, n_step, frame_stack), 1).astype(jnp.uint32)

    def draw(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        attempt, row, lane, is_step = carry
        # The remainder's bias is below num_rows / 2**32; a float would have too few bits for 1M rows.
        bits = jax.random.bits(jax.random.fold_in(key, attempt), (2, batch_size), jnp.uint32)
        row = jnp.where(is_step, row, (first + (bits[0] % num_first).astype(jnp.int32)) % ring.num_rows)
        lane = jnp.where(is_step, lane, (bits[1] % jnp.uint32(ring.num_lanes)).astype(jnp.int32))
        return attempt + 1, row, lane, take(ring, ring.rows.outcome, row, lane) != NO_STEP

    def has_rejected(carry: tuple[Array, Array, Array, Array]) -> Array:
        attempt, _, _, is_step = carry
        return (attempt < MAX_DRAWS) & ~jnp.all(is_step)

    nowhere = jnp.zeros(batch_size, jnp.int32)
    _, row, lane, is_step = jax.lax.while_loop(
        has_rejected, draw, (jnp.int32(0), nowhere, nowhere, jnp.zeros(batch_size, bool))
    )
    return row, lane, is_step.astype(jnp.float32)


def n_step_returns(ring: Ring, row: Array, lane: Array, n_step: int, discount: float) -> tuple[Array, Array, Array]:
    """Returns the return, the discount and the number of steps of the transition that starts at each row.

    Args:
      row: `[batch]` int32, with `n_step` later rows in the ring.
      lane: `[batch]` int32.
      n_step: rewards summed, fewer where the episode ends before.
      discount: per environment step.

    Returns:
      Sum of the k <= n rewards, each discounted to the first row, `[batch]` float32; discount**k, or 0 if the
      episode terminated on the way, `[batch]` float32; and k, `[batch]` int32.
    Source: Sutton 1988; Hessel et al. 2018, arXiv 1710.02298, section "Multi-step learning".
    """
    window = row[:, None] + jnp.arange(n_step)
    outcome = take(ring, ring.rows.outcome, window, lane[:, None])
    reward = take(ring, ring.rows.reward, window, lane[:, None])
    has_ended = jnp.cumsum(outcome != 0, axis=1) > 0
    is_within = jnp.concatenate([jnp.ones_like(has_ended[:, :1]), ~has_ended[:, :-1]], axis=1)
    n_step_return = jnp.sum(reward * is_within * discount ** jnp.arange(n_step, dtype=jnp.float32), axis=1)
    num_steps = jnp.sum(is_within, axis=1, dtype=jnp.int32)
    terminated = jnp.any((outcome == TERMINATED) & is_within, axis=1)
    return n_step_return, jnp.where(terminated, 0.0, discount ** num_steps.astype(jnp.float32)), num_steps


def stacked_observations(ring: Ring, row: Array, lane: Array, frame_stack: int) -> Array:
    """Returns what the agent saw, or would have seen, at each row: the newest frames, oldest first.

    Frames from before the episode's start are zeros, as in the agent's own eyes (`qfleet.core.actor`).

    Args:
      row: `[batch]` int32, with `frame_stack - 1` earlier rows of the same episode in the ring, where it is that old.
      lane: `[batch]` int32.

    Returns:
      `[batch, *observation_shape]`, and one more axis of `frame_stack` where that is above 1.
    """
    if frame_stack == 1:
        return take(ring, ring.rows.obs, row, lane)
    age = jnp.arange(frame_stack - 1, -1, -1)
    window = row[:, None] - age
    frames = take(ring, ring.rows.obs, window, lane[:, None])
    # A final observation still belongs to its episode, so only rows before the newest count as an end before it.
    ends = take(ring, ring.rows.outcome, window, lane[:, None])[:, :-1] == NO_STEP
    exists = (ring.size == ring.num_rows) | (window[:, :-1] >= 0)
    is_older_episode = jnp.cumsum((ends | ~exists)[:, ::-1], axis=1)[:, ::-1] > 0
    is_older_episode = jnp.concatenate([is_older_episode, jnp.zeros_like(ends[:, :1])], axis=1)
    mask = is_older_episode.reshape(is_older_episode.shape + (1,) * (frames.ndim - 2))
    return jnp.moveaxis(jnp.where(mask, jnp.zeros_like(frames), frames), 1, -1)


def take(ring: Ring, buffer: Array, row: Array, lane: Array) -> Array:
    """Returns `buffer[row % rows, lane]` through one flat index: XLA's CPU gather is fastest with a single one."""
    flat = buffer.reshape(-1, *buffer.shape[2:])
    return flat.at[(row % ring.num_rows) * ring.num_lanes + lane].get(mode="promise_in_bounds")
