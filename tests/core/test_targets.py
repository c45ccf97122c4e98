"""Compares targets with answers worked out by hand, and with rlax."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.core import targets

with warnings.catch_warnings():  # rlax imports outdated names, but what it computes is right
    warnings.simplefilter("ignore")
    import rlax

BATCH, TIME, NUM_ACTIONS = 64, 20, 5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return jnp.asarray(3 * rng.normal(size=shape), jnp.float32)


def random_discounts(rng, *shape):
    """Returns discounts of which some are 0 (terminated), and the others have values that n-step windows can have."""
    return jnp.asarray(rng.choice([0.0, 0.99, 0.99**2, 1.0], size=shape), jnp.float32)


def test_the_target_is_the_reward_plus_the_discounted_greatest_next_value():
    assert targets.q_target(jnp.float32(1.0), jnp.float32(0.5), jnp.array([2.0, 6.0, 4.0])) == 4.0


def test_a_terminated_transition_is_worth_its_reward():
    assert targets.q_target(jnp.float32(1.0), jnp.float32(0.0), jnp.array([2.0, 6.0])) == 1.0


def test_double_q_picks_by_the_online_network_and_values_by_the_target_network():
    q_online_t, q_target_t = jnp.array([2.0, 6.0, 4.0]), jnp.array([9.0, 3.0, 5.0])
    assert targets.double_q_target(jnp.float32(1.0), jnp.float32(0.5), q_online_t, q_target_t) == 2.5


def test_double_q_refuses_values_of_different_shapes():
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\)"):
        targets.double_q_target(jnp.float32(1), jnp.float32(1), jnp.zeros(3), jnp.zeros(2))


def test_lambda_returns_by_hand():
    """Lambda 0.5, discount 0.5: G_2 = 4 + 0.5 * 8 = 8; G_1 = 2 + 0.5 (0.5 * 4 + 0.5 * 8) = 5; step 0 terminates."""
    returns = targets.lambda_returns(
        r_t=jnp.array([1.0, 2.0, 4.0]),
        discount_t=jnp.array([0.0, 0.5, 0.5]),
        v_t=jnp.array([100.0, 4.0, 8.0]),
        lambda_t=jnp.array([0.5, 0.5, 0.5]),
    )
    np.testing.assert_array_equal(returns, [1.0, 5.0, 8.0])


def test_a_lambda_of_zero_bootstraps_there_and_looks_no_further():
    """This is a truncated step: the steps after it belong to another episode."""
    returns = targets.lambda_returns(
        r_t=jnp.array([1.0, 2.0, 1e6]),
        discount_t=jnp.array([0.5, 0.5, 0.5]),
        v_t=jnp.array([4.0, 8.0, 1e6]),
        lambda_t=jnp.array([1.0, 0.0, 1.0]),
    )
    np.testing.assert_array_equal(returns[:2], [1 + 0.5 * 6, 2 + 0.5 * 8])


def test_q_target_equals_rlax(rng):
    q_tm1, q_t = normal(rng, BATCH, NUM_ACTIONS), normal(rng, BATCH, NUM_ACTIONS)
    a_tm1, r_t, discount_t = rng.integers(NUM_ACTIONS, size=BATCH), normal(rng, BATCH), random_discounts(rng, BATCH)
    theirs = jax.vmap(rlax.q_learning)(q_tm1, a_tm1, r_t, discount_t, q_t)
    ours = jax.vmap(targets.q_target)(r_t, discount_t, q_t) - targets.take_action(q_tm1, a_tm1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_double_q_target_equals_rlax_also_in_ties(rng):
    q_tm1, q_target_t = normal(rng, BATCH, NUM_ACTIONS), normal(rng, BATCH, NUM_ACTIONS)
    q_online_t = jnp.round(normal(rng, BATCH, NUM_ACTIONS))
    assert any(np.sum(q == q.max()) > 1 for q in np.asarray(q_online_t))
    a_tm1, r_t, discount_t = rng.integers(NUM_ACTIONS, size=BATCH), normal(rng, BATCH), random_discounts(rng, BATCH)
    theirs = jax.vmap(rlax.double_q_learning)(q_tm1, a_tm1, r_t, discount_t, q_target_t, q_online_t)
    target = jax.vmap(targets.double_q_target)(r_t, discount_t, q_online_t, q_target_t)
    np.testing.assert_allclose(target - targets.take_action(q_tm1, a_tm1), theirs, rtol=1e-6, atol=1e-6)


@pytest.fixture(params=["one_lambda", "lambda_per_step"])
def sequence(request, rng):
    shape = (TIME, BATCH)
    lambda_t = 0.65 if request.param == "one_lambda" else rng.choice([0.0, 0.65, 1.0], size=shape)
    lambda_t = jnp.broadcast_to(jnp.asarray(lambda_t, jnp.float32), shape)
    return normal(rng, *shape), random_discounts(rng, *shape), normal(rng, *shape, NUM_ACTIONS), lambda_t


def test_lambda_returns_of_all_lanes_equal_rlax(sequence):
    r_t, discount_t, q_t, lambda_t = sequence
    v_t = q_t[..., 0]
    theirs = jax.vmap(rlax.lambda_returns, 1, 1)(r_t, discount_t, v_t, lambda_t)
    np.testing.assert_allclose(targets.lambda_returns(r_t, discount_t, v_t, lambda_t), theirs, rtol=1e-6, atol=1e-6)


def test_lambda_returns_of_the_greatest_values_are_rlaxs_q_lambda(sequence, rng):
    r_t, discount_t, q_t, lambda_t = sequence
    q_tm1, a_tm1 = normal(rng, TIME, BATCH, NUM_ACTIONS), rng.integers(NUM_ACTIONS, size=(TIME, BATCH))
    theirs = jax.vmap(rlax.q_lambda, 1, 1)(q_tm1, a_tm1, r_t, discount_t, q_t, lambda_t)
    ours = targets.lambda_returns(r_t, discount_t, jnp.max(q_t, -1), lambda_t) - targets.take_action(q_tm1, a_tm1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "target",
    [
        lambda x: targets.q_target(x[0], x[1], x),
        lambda x: targets.double_q_target(x[0], x[1], x, x[::-1]),
        lambda x: jnp.sum(targets.lambda_returns(x, x, x, x)),
    ],
    ids=["q", "double_q", "lambda"],
)
def test_no_gradient_flows_through_a_target(target):
    np.testing.assert_array_equal(jax.grad(target)(jnp.array([0.25, 0.5, 0.75])), 0)


def test_take_action_reads_one_value_and_its_gradient_is_one_there_and_zero_elsewhere():
    q = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    action = jnp.array([2, 0])
    np.testing.assert_array_equal(targets.take_action(q, action), [3, 4])
    gradient = jax.grad(lambda q: jnp.sum(targets.take_action(q, action) * jnp.array([10.0, 20.0])))(q)
    np.testing.assert_array_equal(gradient, [[0, 0, 10], [20, 0, 0]])
