"""Compares transitions that are assembled from rows with answers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.core.replay import sampling
from qfleet.core.replay.ring import CONTINUED, NO_STEP, TERMINATED, TRUNCATED, Ring, Row, later_slot
from qfleet.core.replay.window import Window

GO, END, CUT, LAST = int(CONTINUED), int(TERMINATED), int(TRUNCATED), int(NO_STEP)


def make_ring(outcomes, cursor=0, size=None, rewards=None):
    """Returns a ring of one lane. Row i has the observation i + 1 and the reward 2**i."""
    num_rows = len(outcomes)
    rows = Row(
        obs=jnp.arange(1.0, num_rows + 1)[:, None, None],
        action=jnp.zeros((num_rows, 1), jnp.int32),
        reward=jnp.array(rewards or 2.0 ** np.arange(num_rows), jnp.float32)[:, None],
        outcome=jnp.array(outcomes, jnp.uint8)[:, None],
    )
    size = num_rows if size is None else size
    return Ring(rows, jnp.array([cursor]), jnp.array([size]), jnp.array([size], jnp.uint32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def n_step_returns(ring, n_step, discount=0.5):
    return sampling.n_step_returns(ring, jnp.arange(ring.num_rows, dtype=jnp.uint32), n_step, discount)


def test_three_steps_are_summed_and_discounted_to_the_first():
    reward, discount, num_steps = n_step_returns(make_ring([GO] * 5), 3)
    assert reward[1] == 2 + 4 / 2 + 8 / 4
    assert discount[1] == 0.5**3
    assert num_steps[1] == 3


def test_a_window_wraps_at_the_end_of_the_ring():
    reward, _, _ = n_step_returns(make_ring([GO] * 5, cursor=2), 3)
    assert reward[4] == 16 + 1 / 2 + 2 / 4


def test_termination_stops_the_sum_and_the_bootstrap():
    reward, discount, num_steps = n_step_returns(make_ring([GO, END, LAST, GO, GO]), 3)
    np.testing.assert_array_equal(reward[:2], [1 + 2 / 2, 2])
    np.testing.assert_array_equal(discount[:2], [0, 0])
    np.testing.assert_array_equal(num_steps[:2], [2, 1])


def test_truncation_stops_the_sum_but_bootstraps_from_the_final_observation():
    ring = make_ring([GO, CUT, LAST, GO, GO])
    reward, discount, num_steps = n_step_returns(ring, 3)
    np.testing.assert_array_equal(reward[:2], [1 + 2 / 2, 2])
    np.testing.assert_array_equal(discount[:2], [0.5**2, 0.5])
    slots = later_slot(ring, jnp.arange(2, dtype=jnp.uint32), num_steps[:2])
    np.testing.assert_array_equal(sampling.stacked_observations(ring, slots, 1)[:, 0], [3, 3])


def test_an_end_in_the_last_step_of_the_window_counts_and_one_after_it_does_not():
    _, discount, num_steps = n_step_returns(make_ring([GO, GO, GO, END, LAST]), 3)
    np.testing.assert_array_equal(discount[:2], [0.5**3, 0])
    np.testing.assert_array_equal(num_steps[:2], [3, 3])


def test_a_termination_after_a_truncation_belongs_to_another_episode():
    _, discount, _ = n_step_returns(make_ring([CUT, LAST, END, LAST, GO]), 4)
    np.testing.assert_array_equal(discount[0], 0.5)


def test_without_discounting_every_reward_counts_in_full():
    reward, discount, _ = n_step_returns(make_ring([GO] * 5), 3, discount=1.0)
    assert (reward[0], discount[0]) == (7, 1)


@functools.partial(jax.jit, static_argnums=2)
def stack(ring, row, frame_stack):
    return sampling.stacked_observations(ring, jnp.array([row], jnp.uint32), frame_stack)[0, 0]


def test_the_newest_frame_is_last():
    np.testing.assert_array_equal(stack(make_ring([GO] * 5), 3, 3), [2, 3, 4])


def test_a_stack_wraps_at_the_end_of_the_ring():
    np.testing.assert_array_equal(stack(make_ring([GO] * 5, cursor=3), 1, 3), [5, 1, 2])


@pytest.mark.parametrize(("row", "frames"), [(1, [0, 1, 2]), (2, [1, 2, 3]), (3, [0, 0, 4]), (4, [0, 4, 5])])
def test_no_stack_crosses_an_episodes_start(row, frames):
    """Row 2 holds a final observation, whose stack belongs to the episode that it ended."""
    ring = make_ring([GO, END, LAST, GO, GO, GO], size=5)
    np.testing.assert_array_equal(stack(ring, row, 3), frames)


def test_nothing_comes_before_the_first_row_of_a_ring_that_is_not_full():
    np.testing.assert_array_equal(stack(make_ring([GO] * 5, cursor=2, size=2), 0, 3), [0, 0, 1])


def test_two_short_episodes_within_one_stack_leave_the_newest():
    ring = make_ring([CUT, LAST, END, LAST, GO, GO])
    np.testing.assert_array_equal(stack(ring, 4, 4), [0, 0, 0, 5])
    np.testing.assert_array_equal(stack(ring, 3, 4), [0, 0, 3, 4])


@pytest.mark.parametrize(
    ("size", "cursor", "n_step", "frame_stack", "first", "count"),
    [
        (0, 0, 1, 1, 0, 0),
        (3, 3, 3, 1, 0, 0),
        (4, 4, 3, 1, 0, 1),
        (4, 4, 1, 4, 0, 3),  # the ring isn't full, so nothing has been overwritten
        (8, 0, 1, 1, 0, 7),
        (8, 0, 3, 4, 3, 2),
        (8, 6, 3, 4, 1, 2),
    ],
)
def test_rows_that_may_start_a_transition_have_their_stack_and_window(size, cursor, n_step, frame_stack, first, count):
    ring, window = make_ring([GO] * 8, cursor=cursor, size=size), Window(n_step, frame_stack)
    assert sampling.first_row(ring, window).tolist() == [first]
    assert sampling.num_starts(ring, window).tolist() == [count]
