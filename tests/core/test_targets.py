"""Compares targets with answers worked out by hand, and with rlax."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core import targets
from qfleet.core.agent import make_agent
from qfleet.core.types import Network, Transition

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


def transitions(rng):
    """Returns transitions, each with an observation and a next observation that are its Q-values themselves."""
    return Transition(
        obs=normal(rng, BATCH, NUM_ACTIONS),
        action=jnp.asarray(rng.integers(NUM_ACTIONS, size=BATCH)),
        reward=normal(rng, BATCH),
        discount=random_discounts(rng, BATCH),
        next_obs=jnp.round(normal(rng, BATCH, NUM_ACTIONS)),
        weight=jnp.ones(BATCH),
    )


SHOWN = Network(init=lambda key: jnp.float32(1), apply=lambda scale, obs: scale * obs)
"""The network whose Q-values are its observations, times its only parameter."""


def td_errors(batch, online, target, **settings):
    return make_agent(SHOWN, AgentConfig(**settings)).loss(jnp.float32(online), jnp.float32(target), batch)[1].td_error


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


def test_td_errors_equal_rlax(rng):
    batch = transitions(rng)
    theirs = jax.vmap(rlax.q_learning)(batch.obs, batch.action, batch.reward, batch.discount, 0.5 * batch.next_obs)
    np.testing.assert_allclose(td_errors(batch, 1.0, 0.5), theirs, rtol=1e-6, atol=1e-6)


def test_td_errors_of_double_q_equal_rlax_also_in_ties(rng):
    """The online values of the next observations are the negative of the target network's."""
    batch = transitions(rng)
    assert any(np.sum(q == q.max()) > 1 for q in -np.asarray(batch.next_obs))
    theirs = jax.vmap(rlax.double_q_learning)(
        -batch.obs, batch.action, batch.reward, batch.discount, batch.next_obs, -batch.next_obs
    )
    np.testing.assert_allclose(td_errors(batch, -1.0, 1.0, double=True), theirs, rtol=1e-6, atol=1e-6)


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


def test_no_gradient_flows_through_lambda_returns():
    gradient = jax.grad(lambda x: jnp.sum(targets.lambda_returns(x, x, x, x)))(jnp.array([0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(gradient, 0)


def test_the_bonus_of_munchausen_by_hand():
    """Values 0 and log(3) at temperature 1 are chosen with probabilities 1/4 and 3/4."""
    log_policy = targets.soft_policy(jnp.log(jnp.array([1.0, 3.0])), 1.0)
    np.testing.assert_allclose(jnp.exp(log_policy), [0.25, 0.75], rtol=1e-6)
    bonus = targets.munchausen_bonus(jnp.stack([log_policy] * 2), jnp.array([0, 1]), 1.0, 0.5, -1.0)
    np.testing.assert_allclose(bonus, [0.5 * -1.0, 0.5 * np.log(0.75)], rtol=1e-6)
