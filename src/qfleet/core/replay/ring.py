"""A ring of rows that stores each observation once.

A row is what one step of all lanes produced. Every environment follows Gymnasium's NEXT_STEP autoreset: the row
after an episode's end holds the final observation and no step, the row after that starts the next episode. So the
successor of row t is always row t+1, and no second copy of it is kept.

One lane of one row is a *slot*, numbered `row * lanes + lane`: transitions are drawn and put together by slot, in
unsigned numbers, which XLA neither divides with care for their sign nor counts from an array's end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What the step from a row led to: one byte, for `terminated` and `truncated` exclude each other once stored
# (an episode that did both has no future: terminated).
CONTINUED, TERMINATED, TRUNCATED, NO_STEP = (np.uint8(kind) for kind in range(4))
"""`NO_STEP` marks a final observation: its action was ignored, and it starts no transition."""


class Row(NamedTuple):
    """What one step of all lanes produced. `[lanes, ...]`, in the ring `[rows, lanes, ...]`."""

    obs: Array
    """`[lanes, *observation_shape]`, acted on; a single frame where frames are stacked."""
    action: Array
    """`[lanes]` int32."""
    reward: Array
    """`[lanes]` float32."""
    outcome: Array
    """`[lanes]` uint8: `CONTINUED`, `TERMINATED`, `TRUNCATED` or `NO_STEP`."""


class Ring(NamedTuple):
    """The newest rows. A state: insert returns the next one, in place where buffers are donated."""

    rows: Row
    """`[rows, lanes, ...]`."""
    cursor: Array
    """`[]` int32, where the next row goes."""
    size: Array
    """`[]` int32, rows held."""
    insertions: Array
    """`[]` uint32, rows ever inserted, modulo 2**32: tells late priorities from fresh ones."""

    @property
    def num_rows(self) -> int:
        """Rows that the ring can hold."""
        return self.rows.outcome.shape[0]

    @property
    def num_lanes(self) -> int:
        """Lanes of each row."""
        return self.rows.outcome.shape[1]

    @property
    def num_slots(self) -> int:
        """Steps that the ring can hold, over all lanes."""
        return self.rows.outcome.size


def init_ring(num_rows: int, num_lanes: int, observation_shape: tuple[int, ...], observation_dtype: np.dtype) -> Ring:
    """Returns an empty ring of `num_rows` rows of `num_lanes` lanes."""
    shape = (num_rows, num_lanes)
    rows = Row(
        obs=jnp.zeros((*shape, *observation_shape), observation_dtype),
        action=jnp.zeros(shape, jnp.int32),
        reward=jnp.zeros(shape, jnp.float32),
        outcome=jnp.full(shape, NO_STEP),
    )
    return Ring(rows, cursor=jnp.int32(0), size=jnp.int32(0), insertions=jnp.uint32(0))


def insert_row(ring: Ring, row: Row) -> Ring:
    """Returns the ring with `row` in place of its oldest, or in a free place."""
    rows = jax.tree.map(
        lambda buffer, new: jax.lax.dynamic_update_index_in_dim(buffer, new.astype(buffer.dtype), ring.cursor, axis=0),
        ring.rows,
        row,
    )
    return Ring(
        rows,
        cursor=(ring.cursor + 1) % ring.num_rows,
        size=jnp.minimum(ring.size + 1, ring.num_rows),
        insertions=ring.insertions + jnp.uint32(1),
    )


def seal(ring: Ring, lanes: Array) -> Ring:
    """Returns the ring with the newest row's step cut short in some lanes, `[lanes]` bool, where the episode went on.

    For lanes whose environment was lost in the step after it: the row that is inserted next holds the observation it
    led to, and no step. No return, stack or bootstrap reaches beyond.
    """
    newest = (ring.cursor - 1) % ring.num_rows
    outcome = jax.lax.dynamic_index_in_dim(ring.rows.outcome, newest, keepdims=False)
    sealed = jnp.where(lanes & (outcome == CONTINUED), TRUNCATED, outcome)
    outcomes = jax.lax.dynamic_update_index_in_dim(ring.rows.outcome, sealed, newest, axis=0)
    return ring._replace(rows=ring.rows._replace(outcome=outcomes))


def outcome_of(terminated: Array, truncated: Array, final: Array) -> Array:
    """Returns each lane's `Row.outcome`, `[lanes]` uint8, from three `[lanes]` bool.

    Args:
      terminated: the step ended the episode in a state without a future.
      truncated: the step was the last one allowed; the state after it still has a value.
      final: the row holds a final observation, and no step.
    """
    ended = jnp.where(terminated, TERMINATED, jnp.where(truncated, TRUNCATED, CONTINUED))
    return jnp.where(final, NO_STEP, ended)


def later_slot(ring: Ring, slot: Array, num_rows: Array | np.ndarray | int) -> Array:
    """Returns the slot in the same lane `num_rows` rows later, at most as many as the ring holds.

    Args:
      ring: the ring.
      slot: `[...]` uint32.
      num_rows: of a shape that broadcasts with `slot`. To look back by k rows, look ahead by `ring.num_rows - k`.

    Returns:
      `[...]` uint32.
    """
    later = slot + jnp.asarray(num_rows, jnp.uint32) * jnp.uint32(ring.num_lanes)
    return jnp.where(later >= ring.num_slots, later - jnp.uint32(ring.num_slots), later)


def take(buffer: Array, slot: Array) -> Array:
    """Returns what one of the ring's buffers, `[rows, lanes, ...]`, holds in each slot, `[...]` uint32.

    By one flat index, for XLA's CPU gather is fastest with a single one.
    """
    return buffer.reshape(-1, *buffer.shape[2:]).at[slot].get(mode="promise_in_bounds")


def is_overwritten(ring: Ring, row: Array, insertions: Array) -> Array:
    """Returns whether each row has been overwritten since the ring had seen `insertions` rows.

    Args:
      ring: the ring now.
      row: `[...]` uint32, places in the ring that held valid rows then.
      insertions: `[]` uint32, `Ring.insertions` then.

    Returns:
      `[...]` bool.
    """
    num_rows = jnp.uint32(ring.num_rows)
    elapsed = ring.insertions - insertions  # modulo 2**32, so that a wrapped counter does no harm
    cursor_then = (ring.cursor.astype(jnp.uint32) + num_rows - elapsed % num_rows) % num_rows
    inserts_until_reached = (row + num_rows - cursor_then) % num_rows + 1
    return elapsed >= inserts_until_reached
