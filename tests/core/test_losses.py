"""Compares losses with answers worked out by hand, and with rlax."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core import losses

with warnings.catch_warnings():  # rlax imports outdated names, but what it computes is right
    warnings.simplefilter("ignore")
    import rlax

ERRORS = jnp.asarray(4 * np.random.default_rng(0).normal(size=(8, 32)), jnp.float32)


def total(loss):
    return lambda errors: jnp.sum(loss(errors))


def test_the_squared_loss_is_rlaxs_and_its_gradient_the_error():
    np.testing.assert_allclose(losses.squared_loss(ERRORS), rlax.l2_loss(ERRORS), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total(losses.squared_loss))(ERRORS), ERRORS, rtol=1e-6)
    assert losses.squared_loss(jnp.float32(-3.0)) == 4.5


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_the_huber_loss_and_its_gradient_are_rlaxs(delta):
    ours, theirs = (lambda x: losses.huber_loss(x, delta)), (lambda x: rlax.huber_loss(x, delta))
    np.testing.assert_allclose(ours(ERRORS), theirs(ERRORS), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(total(ours))(ERRORS)
    np.testing.assert_allclose(gradient, jax.grad(total(theirs))(ERRORS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("delta", [0.5, 3.0, 1e8])
def test_the_gradient_of_huber_is_the_clipped_error_exactly(delta):
    """If no error reaches delta, the loss is the squared loss, also for small errors."""
    gradient = jax.grad(total(lambda x: losses.huber_loss(x, delta)))(ERRORS)
    np.testing.assert_allclose(gradient, np.clip(ERRORS, -delta, delta), rtol=1e-6)


def test_huber_by_hand():
    """The loss is 0.5 * 1**2 within delta 2, and 0.5 * 2**2 + 2 * (5 - 2) beyond."""
    np.testing.assert_array_equal(losses.huber_loss(jnp.array([1.0, -1.0, 5.0, -5.0, 0.0]), 2.0), [0.5, 0.5, 8, 8, 0])


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0])
def test_huber_has_a_gradient_at_its_joints(error):
    """The joints are zero, and the points where the parabola meets the line."""
    assert jax.grad(lambda x: losses.huber_loss(x, 1.0))(jnp.float32(error)) == error


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AgentConfig(loss="squared", huber_delta=2.0), 12.5),
        (AgentConfig(loss="huber"), 4.5),
        (AgentConfig(loss="huber", huber_delta=2.0), 8.0),
    ],
)
def test_the_config_names_the_loss(config, expected):
    assert losses.make_loss(config)(jnp.float32(-5.0)) == expected
