"""A ring of rows that stores each observation once.

A row is what one step of all lanes produced. Every environment follows Gymnasium's NEXT_STEP autoreset: the row
after an episode's end holds the final observation and no step, and the row after that starts the next episode. So the
successor of row t is always row t+1, and no second copy of an observation is kept.

One lane of one row is a *slot*, numbered `row * lanes + lane`. Transitions are drawn and assembled by slot. Slots are
unsigned, because signed numbers cost more: XLA rounds their quotients by their sign, and checks indices for negative
ones.

Lanes that step together form a *segment* with one write head. The lanes of a single learner are one segment. If many
actors share a ring, each actor has a segment and writes at its own pace.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What the step from a row led to. One byte is enough, because `terminated` and `truncated` exclude each other once they
# are stored: an episode that did both has no future, so it counts as terminated.
CONTINUED, TERMINATED, TRUNCATED, NO_STEP = (np.uint8(kind) for kind in range(4))
"""`NO_STEP` marks a final observation. Its action was ignored, and it starts no transition."""


class Row(NamedTuple):
    """What one step of all lanes produced: `[lanes, ...]`, and in the ring `[rows, lanes, ...]`."""

    obs: Array
    """`[lanes, *observation_shape]`, the observation acted on. If frames are stacked, it is a single frame."""
    action: Array
    """`[lanes]` int32."""
    reward: Array
    """`[lanes]` float32."""
    outcome: Array
    """`[lanes]` uint8: `CONTINUED`, `TERMINATED`, `TRUNCATED` or `NO_STEP`."""
    carry: Any = ()
    """`[lanes, size]` float32, what a recurrent network remembered before the observation: zeros at the start of an
    episode. `()` without memory."""


class Ring(NamedTuple):
    """The newest rows. This is a state: functions return the next one, and change it in place if it is donated."""

    rows: Row
    """`[rows, lanes, ...]`."""
    cursor: Array
    """`[segments]` int32, the row that is written next."""
    size: Array
    """`[segments]` int32, number of rows held."""
    insertions: Array
    """`[segments]` uint32, number of rows ever inserted, modulo 2**32. It tells late priorities from fresh ones."""

    @property
    def num_rows(self) -> int:
        """Rows that the ring can hold."""
        return self.rows.outcome.shape[0]

    @property
    def num_lanes(self) -> int:
        """Lanes of each row."""
        return self.rows.outcome.shape[1]

    @property
    def lanes_per_segment(self) -> int:
        """Neighbouring lanes that are written together."""
        return self.num_lanes // len(self.cursor)

    @property
    def num_slots(self) -> int:
        """Steps that the ring can hold, over all lanes."""
        return self.rows.outcome.size


def init_ring(
    num_rows: int,
    num_lanes: int,
    observation_shape: tuple[int, ...],
    observation_dtype: np.dtype,
    num_segments: int = 1,
    carry_size: int = 0,
) -> Ring:
    """Returns an empty ring of `num_rows` rows of `num_lanes` lanes, in `num_segments` segments of equal size.

    If `carry_size` isn't 0, rows keep as many numbers of what a recurrent network remembered.
    """
    shape = (num_rows, num_lanes)
    rows = Row(
        obs=jnp.zeros((*shape, *observation_shape), observation_dtype),
        action=jnp.zeros(shape, jnp.int32),
        reward=jnp.zeros(shape, jnp.float32),
        outcome=jnp.full(shape, NO_STEP),
        carry=jnp.zeros((*shape, carry_size)) if carry_size else (),
    )
    return Ring(
        rows,
        cursor=jnp.zeros(num_segments, jnp.int32),
        size=jnp.zeros(num_segments, jnp.int32),
        insertions=jnp.zeros(num_segments, jnp.uint32),
    )


def insert_row(ring: Ring, row: Row, segment: Array | int = 0) -> Ring:
    """Returns the ring with `row`, `[lanes_per_segment, ...]`, in a free place or in place of the segment's oldest."""
    cursor = ring.cursor[segment]

    def put(buffer: Array, new: Array) -> Array:
        start = (cursor, segment * ring.lanes_per_segment, *(0,) * (buffer.ndim - 2))
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype)[None], start)

    is_written = jnp.arange(len(ring.cursor)) == segment
    return Ring(
        jax.tree.map(put, ring.rows, row),
        cursor=jnp.where(is_written, (ring.cursor + 1) % ring.num_rows, ring.cursor),
        size=jnp.where(is_written, jnp.minimum(ring.size + 1, ring.num_rows), ring.size),
        insertions=ring.insertions + is_written.astype(jnp.uint32),
    )


def outcomes_at(ring: Ring, row: Array, segment: Array | int = 0) -> Array:
    """Returns the outcomes of one row of a segment, `[lanes_per_segment]`. The number of the row is `[]`."""
    start, size = (row, segment * ring.lanes_per_segment), (1, ring.lanes_per_segment)
    return jax.lax.dynamic_slice(ring.rows.outcome, start, size)[0]


def hold_a_step(ring: Ring, row: Array, num_rows: int, segment: Array | int = 0) -> Array:
    """Returns whether any of `num_rows` rows from `row` on, `[]`, holds a step: `[lanes_per_segment]` bool."""
    if num_rows == 1:
        return outcomes_at(ring, row, segment) != NO_STEP
    rows = (row + jnp.arange(num_rows)) % ring.num_rows
    outcomes = ring.rows.outcome.at[rows].get(mode="promise_in_bounds")
    if len(ring.cursor) > 1:
        start = (0, segment * ring.lanes_per_segment)
        outcomes = jax.lax.dynamic_slice(outcomes, start, (num_rows, ring.lanes_per_segment))
    return jnp.any(outcomes != NO_STEP, axis=0)


def _with_outcomes(ring: Ring, row: Array, segment: Array | int, outcome: Array) -> Ring:
    start = (row, segment * ring.lanes_per_segment)
    outcomes = jax.lax.dynamic_update_slice(ring.rows.outcome, outcome[None], start)
    return ring._replace(rows=ring.rows._replace(outcome=outcomes))


def seal(ring: Ring, lanes: Array, segment: Array | int = 0) -> Ring:
    """Returns the ring with the newest step of a segment cut short in some lanes, unless it ended the episode anyway.

    This is for lanes whose environment was lost during the step after it. The row that is inserted next must hold the
    observation that the newest step led to, and no step. No return, stack or bootstrap then crosses that row.

    Args:
      ring: the ring.
      lanes: `[lanes_per_segment]` bool, the lanes to cut.
      segment: the segment whose newest row is changed.
    """
    newest = (ring.cursor[segment] - 1) % ring.num_rows
    outcome = outcomes_at(ring, newest, segment)
    return _with_outcomes(ring, newest, segment, jnp.where(lanes & (outcome == CONTINUED), TRUNCATED, outcome))


def cut(ring: Ring, segment: Array | int = 0) -> Ring:
    """Returns the ring with a segment closed after its newest row, so that nothing inserted later continues it.

    This is for a segment whose writer was lost, and with it the observations that its newest steps led to. The newest
    rows become final observations, and the steps before them are cut short there.
    """
    newest = (ring.cursor[segment] - 1) % ring.num_rows
    is_step = outcomes_at(ring, newest, segment) != NO_STEP
    before = (newest - 1) % ring.num_rows
    outcome = outcomes_at(ring, before, segment)
    ring = _with_outcomes(ring, before, segment, jnp.where(is_step & (outcome == CONTINUED), TRUNCATED, outcome))
    return _with_outcomes(ring, newest, segment, jnp.full(ring.lanes_per_segment, NO_STEP))


def sealed_outcomes(outcome: Array) -> Array:
    """Returns outcomes of consecutive rows, `[rows, lanes]`, with steps cut short where the next row holds no step.

    The environment was lost there. This is what `seal` does to a ring, row by row.
    """
    is_cut = jnp.concatenate([outcome[1:] == NO_STEP, jnp.zeros_like(outcome[:1], bool)])
    return jnp.where(is_cut & (outcome == CONTINUED), TRUNCATED, outcome)


def outcome_of(terminated: Array | np.ndarray, truncated: Array | np.ndarray, final: Array | np.ndarray) -> Array:
    """Returns each lane's `Row.outcome`, `[lanes]` uint8, from three `[lanes]` bool.

    Args:
      terminated: whether the step ended the episode in a state without a future.
      truncated: whether the step was the last one allowed. The state after it still has a value.
      final: whether the row holds a final observation and no step.
    """
    ended = jnp.where(terminated, TERMINATED, jnp.where(truncated, TRUNCATED, CONTINUED))
    return jnp.where(final, NO_STEP, ended)


def later_slot(ring: Ring, slot: Array, num_rows: Array | np.ndarray | int) -> Array:
    """Returns the slot in the same lane `num_rows` rows later.

    Args:
      ring: the ring.
      slot: `[...]` uint32.
      num_rows: at most the rows of the ring, in a shape that broadcasts with `slot`. To look back by k rows, look ahead
        by `ring.num_rows - k`.

    Returns:
      `[...]` uint32.
    """
    later = slot + jnp.asarray(num_rows, jnp.uint32) * jnp.uint32(ring.num_lanes)
    return jnp.where(later >= ring.num_slots, later - jnp.uint32(ring.num_slots), later)


def take(buffer: Array, slot: Array) -> Array:
    """Returns what one of the ring's buffers, `[rows, lanes, ...]`, holds in each slot, `[...]` uint32.

    It uses one flat index, because XLA's gather on a CPU is fastest with a single index.
    """
    return buffer.reshape(-1, *buffer.shape[2:]).at[slot].get(mode="promise_in_bounds")


def of_segment(ring: Ring, values: Array, slot: Array) -> Array:
    """Returns the element of `values`, `[segments]`, for each slot's segment: `[...]`, or `[]` if there is only one."""
    if len(values) == 1:
        return values[0]
    return values[slot % jnp.uint32(ring.num_lanes) // jnp.uint32(ring.lanes_per_segment)]


def is_overwritten(ring: Ring, slot: Array, insertions: Array) -> Array:
    """Returns whether each slot has been overwritten since the ring had seen `insertions` rows.

    Args:
      ring: the ring now.
      slot: `[...]` uint32, slots that held valid rows at that time.
      insertions: `[segments]` uint32, `Ring.insertions` at that time.

    Returns:
      `[...]` bool.
    """
    num_rows, row = jnp.uint32(ring.num_rows), slot // jnp.uint32(ring.num_lanes)
    elapsed = of_segment(ring, ring.insertions - insertions, slot)  # modulo 2**32: a wrapped counter does no harm
    cursor = of_segment(ring, ring.cursor, slot).astype(jnp.uint32)
    cursor_then = (cursor + num_rows - elapsed % num_rows) % num_rows
    inserts_until_reached = (row + num_rows - cursor_then) % num_rows + 1
    return elapsed >= inserts_until_reached
