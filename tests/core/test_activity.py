"""Dormant units: the definition worked by hand, and how active the units of the built-in networks are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core.activity import TAU, dormant_fraction, make_with_activity, sum_where
from qfleet.core.types import EnvSpec
from qfleet.networks import make_network

VECTOR = EnvSpec(name="vector", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2)
IMAGE = EnvSpec(name="image", observation_shape=(6, 6, 1), observation_dtype=np.dtype(np.uint8), num_actions=2)


def test_a_unit_is_dormant_if_it_does_less_than_tau_of_its_layers_average() -> None:
    """The averages of the layers are 10 and 2: only 0.2 is below 10 * tau, and 0.01 below 2 * tau."""
    layers = (np.array([0.2, 0.3, 19.8, 19.7]), np.array([0.01, 3.99]))
    assert pytest.approx(0.025) == TAU
    assert dormant_fraction(layers) == pytest.approx(2 / 6)


def test_a_layer_without_any_activity_is_dormant_and_no_layer_is_unknown() -> None:
    assert dormant_fraction((np.zeros(3), np.ones(1))) == 0.75
    assert np.isnan(dormant_fraction(()))


def test_each_seed_has_a_share_of_its_own() -> None:
    np.testing.assert_array_equal(dormant_fraction((np.array([[0.0, 1.0], [1.0, 1.0]]),)), [0.5, 0.0])


def test_only_the_observations_that_count_are_added_up() -> None:
    activity = (jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]),)
    np.testing.assert_array_equal(sum_where(activity, jnp.array([True, False, True]))[0], [101.0, 202.0])


@pytest.mark.parametrize(
    ("spec", "settings", "sizes"),
    [
        (VECTOR, {"hidden_sizes": (8, 6)}, (8, 6)),
        (VECTOR, {"hidden_sizes": (8, 6), "dueling": True, "layer_norm": True}, (8, 6, 6)),
        (VECTOR, {"hidden_sizes": ()}, ()),
        (IMAGE, {"hidden_sizes": (5,)}, (16, 5)),
    ],
)
def test_every_hidden_layer_is_measured_and_the_values_are_the_same(
    spec: EnvSpec, settings: dict, sizes: tuple[int, ...]
) -> None:
    network = make_network(spec, AgentConfig(**settings))
    params = jax.jit(network.init)(jax.random.key(0))
    obs = jax.random.randint(jax.random.key(1), (3, *spec.observation_shape), 0, 255).astype(spec.observation_dtype)
    q, activity = jax.jit(make_with_activity(network))(params, obs)
    np.testing.assert_allclose(q, jax.jit(network.apply)(params, obs), rtol=1e-6, atol=1e-6)
    assert tuple(layer.shape for layer in activity) == tuple((3, size) for size in sizes)


def test_a_unit_that_never_fires_is_found() -> None:
    network = make_network(VECTOR, AgentConfig(hidden_sizes=(8,)))
    params = jax.jit(network.init)(jax.random.key(0))
    params["hidden"]["layers"]["0"]["linear"]["bias"] = jnp.zeros(8).at[3].set(-1e3)
    _, (layer,) = jax.jit(make_with_activity(network))(params, jax.random.normal(jax.random.key(1), (64, 4)))
    assert layer.sum(axis=0)[3] == 0
    assert dormant_fraction((np.asarray(layer.sum(axis=0)),)) == 1 / 8


def test_a_network_that_shows_no_units_has_no_activity() -> None:
    network = make_network(VECTOR, AgentConfig(hidden_sizes=(8,)))._replace(with_activations=None)
    obs = jnp.ones((2, 4))
    q, activity = make_with_activity(network)(network.init(jax.random.key(0)), obs)
    assert q.shape == (2, 2) and activity == ()
