"""Compares an actor's initial TD errors with a loop over single steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.core.initial_priorities import ValuedRows, initial_td_errors, padding_rows
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, TRUNCATED

DISCOUNT = 0.9


def by_hand(rows, start, lane, n_step):
    """Returns the n-step return from one step, by the actor's values, minus the value that the actor gave the step."""
    total, factor = 0.0, 1.0
    for t in range(start, start + n_step):
        total += factor * rows.reward[t, lane]
        factor *= DISCOUNT
        outcome = rows.outcome[t, lane]
        if outcome == TERMINATED:
            break
        is_lost = outcome == CONTINUED and rows.outcome[t + 1, lane] == NO_STEP  # the environment failed there
        if outcome == TRUNCATED or is_lost or t == start + n_step - 1:
            total += factor * rows.q_max[t + 1, lane]
            break
    return total - rows.q_taken[start, lane]


@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_initial_td_errors_equal_those_of_single_steps(n_step):
    random = np.random.default_rng(n_step)
    num_rows, num_lanes = 60, 4
    outcome = np.full((num_rows, num_lanes), CONTINUED)
    for lane in range(num_lanes):
        t = 0
        while t < num_rows - 1:
            t += int(random.integers(1, 9))
            if t < num_rows - 1:
                # An episode ends, and its final observation follows; or an environment fails and leaves a row without a
                # step.
                outcome[t, lane] = random.choice([TERMINATED, TRUNCATED, CONTINUED])
                outcome[t + 1, lane] = NO_STEP
                t += 2
    numbers = random.normal(size=(3, num_rows, num_lanes)).astype(np.float32)
    rows = ValuedRows(numbers[0], outcome, numbers[1], numbers[2])
    errors = np.asarray(initial_td_errors(ValuedRows(*map(jnp.asarray, rows)), n_step, DISCOUNT))
    assert errors.shape == (num_rows - n_step, num_lanes)
    for start in range(num_rows - n_step):
        for lane in range(num_lanes):
            if outcome[start, lane] != NO_STEP:
                np.testing.assert_allclose(
                    errors[start, lane], by_hand(rows, start, lane, n_step), rtol=1e-4, atol=1e-5
                )


def test_padding_before_an_actors_first_row_has_unknown_errors():
    before, ones = padding_rows(3, 2), jnp.ones((4, 2))
    rows = ValuedRows(
        *(
            jnp.concatenate([b, x])
            for b, x in zip(before, (ones, jnp.zeros((4, 2), jnp.uint8), ones, ones), strict=True)
        )
    )
    errors = np.asarray(initial_td_errors(rows, 3, DISCOUNT))
    assert np.all(np.isnan(errors[:3])) and np.all(np.isfinite(errors[3]))


def test_values_that_are_rescaled_bootstrap_as_returns():
    """h(2 + 0.9 * 3) - 0.5, where the next value is h(3) = 1.003."""
    rows = ValuedRows(
        reward=jnp.array([[2.0], [0.0]]),
        outcome=jnp.full((2, 1), CONTINUED),
        q_taken=jnp.array([[0.5], [0.0]]),
        q_max=jnp.array([[0.5], [1.003]]),
    )
    errors = initial_td_errors(rows, 1, 0.9, is_rescaled=True)
    np.testing.assert_allclose(errors, [[5.7**0.5 - 1 + 0.0047 - 0.5]], rtol=1e-5)
