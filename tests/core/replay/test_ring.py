"""The ring of rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.core.replay.ring import (
    CONTINUED,
    NO_STEP,
    TERMINATED,
    TRUNCATED,
    Row,
    init_ring,
    insert_row,
    is_overwritten,
    later_slot,
    outcome_of,
    take,
)

NUM_ROWS, NUM_LANES = 5, 2


def make_row(t):
    lanes = np.arange(NUM_LANES)
    return Row(
        obs=jnp.array(np.stack([np.full(3, t), lanes.repeat(3)[:3]]), jnp.uint8),
        action=jnp.array(10 * t + lanes, jnp.int32),
        reward=jnp.array(t + lanes / 10, jnp.float32),
        outcome=jnp.array([CONTINUED, TRUNCATED]),
    )


def insert_rows(ring, times):
    for t in times:
        ring = jax.jit(insert_row)(ring, make_row(t))
    return ring


@pytest.fixture
def empty():
    return init_ring(NUM_ROWS, NUM_LANES, (3,), np.dtype(np.uint8))


@pytest.mark.parametrize("num_inserted", [0, 1, 4, 5, 6, 13])
def test_the_newest_rows_are_kept_and_the_oldest_leave(empty, num_inserted):
    ring = insert_rows(empty, range(num_inserted))
    assert int(ring.cursor[0]) == num_inserted % NUM_ROWS
    assert int(ring.size[0]) == min(num_inserted, NUM_ROWS)
    assert int(ring.insertions[0]) == num_inserted
    for t in range(max(0, num_inserted - NUM_ROWS), num_inserted):
        held = jax.tree.map(lambda buffer, t=t: buffer[t % NUM_ROWS], ring.rows)
        jax.tree.map(np.testing.assert_array_equal, held, make_row(t))


def test_an_empty_ring_holds_no_step(empty):
    assert np.all(empty.rows.outcome == NO_STEP)


def test_each_observation_is_stored_once_in_its_own_type(empty):
    assert empty.rows.obs.dtype == np.uint8
    bytes_per_step = 3 + 4 + 4 + 1  # observation, action, reward, outcome
    assert sum(x.nbytes for x in jax.tree.leaves(empty.rows)) == NUM_ROWS * NUM_LANES * bytes_per_step
    assert insert_rows(empty, [0]).rows.obs.dtype == np.uint8


def test_outcomes_keep_termination_and_truncation_apart():
    terminated, truncated, final = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    expected = [CONTINUED, TERMINATED, TRUNCATED, TERMINATED, NO_STEP]  # doing both leaves no future: terminated
    outcome = outcome_of(terminated, truncated, final)
    assert outcome.dtype == np.uint8
    np.testing.assert_array_equal(outcome, expected)


@pytest.mark.parametrize("seen_first", [0, 2**32 - 7])
@pytest.mark.parametrize("num_before", [1, 3, 5, 8])
def test_a_row_is_overwritten_once_the_cursor_has_passed_it(empty, num_before, seen_first):
    """Also if the counter of insertions wraps in between."""
    ring = insert_rows(empty._replace(insertions=jnp.array([seen_first], jnp.uint32)), range(num_before))
    seen = ring.insertions
    held = range(max(0, num_before - NUM_ROWS), num_before)
    for num_later in range(2 * NUM_ROWS + 2):
        answer = is_overwritten(ring, jnp.arange(NUM_ROWS, dtype=jnp.uint32) * NUM_LANES, seen)
        for t in held:
            is_gone = t < num_before + num_later - NUM_ROWS
            assert bool(answer[t % NUM_ROWS]) == is_gone, (t, num_later)
        ring = insert_rows(ring, [num_before + num_later])


def test_inserting_into_a_donated_ring_writes_in_place(empty):
    insert = jax.jit(insert_row, donate_argnums=0)
    before = empty.rows.obs.unsafe_buffer_pointer()
    ring = insert(empty, make_row(0))
    assert ring.rows.obs.unsafe_buffer_pointer() == before
    assert empty.rows.obs.is_deleted()


def test_a_slot_is_a_row_and_a_lane_and_later_ones_wrap_at_the_end(empty):
    ring = insert_rows(empty, range(NUM_ROWS))
    for row, lane, num_rows in itertools.product(range(NUM_ROWS), range(NUM_LANES), (0, 1, NUM_ROWS - 1, NUM_ROWS)):
        slot = later_slot(ring, jnp.uint32(row * NUM_LANES + lane), num_rows)
        np.testing.assert_array_equal(take(ring.rows.action, slot), ring.rows.action[(row + num_rows) % NUM_ROWS, lane])
