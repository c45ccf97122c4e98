"""Networks as pure functions, made from modules or given as a pair of functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.heads import make_head
from qfleet.core.types import Network
from qfleet.envs.spec import EnvSpec
from qfleet.networks import QNetwork, check_network, from_nnx, make_network

SPEC = EnvSpec(name="small", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2)
CONFIG = AgentConfig(hidden_sizes=(8,), layer_norm=True)


class UserModule(nnx.Module):
    """A user's module with layers in lists. One list has more than ten, because "10" sorts before "2"."""

    def __init__(self, rngs, inputs=4, actions=2):
        self.layers = nnx.Sequential(nnx.Linear(inputs, 8, rngs=rngs), jax.nn.tanh)
        self.offsets = nnx.List([nnx.Param(jnp.float32(i)) for i in range(11)])
        self.head = nnx.Linear(8, actions, rngs=rngs)

    def __call__(self, x):
        x = self.layers(x)
        for offset in self.offsets:
            x = jnp.sin(x + offset[...])
        return self.head(x)


def all_keys(tree):
    for key, value in tree.items():
        yield key
        if isinstance(value, dict):
            yield from all_keys(value)


@pytest.mark.parametrize("make_module", [UserModule, lambda rngs: QNetwork(SPEC, CONFIG, rngs)], ids=["user", "ours"])
def test_a_module_and_its_pure_functions_give_the_same_values(make_module):
    network = from_nnx(make_module)
    check_network(network, SPEC)
    key = jax.random.key(3)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    params = network.init(key)
    np.testing.assert_allclose(network.apply(params, x), make_module(nnx.Rngs(key))(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(network.apply)(params, x), network.apply(params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", [from_nnx(UserModule), make_network(SPEC, CONFIG)], ids=["user", "ours"])
def test_parameters_are_plain_dicts_with_names_for_keys(network):
    params = network.init(jax.random.key(0))
    assert all(isinstance(key, str) for key in all_keys(params))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    gradients = jax.grad(lambda params: network.apply(params, jnp.ones((2, 4))).sum())(params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["head"]))


def test_vmapped_keys_give_each_learner_its_own_parameters():
    network = make_network(SPEC, CONFIG)
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(network.init))(keys)
    kernels = many["head"]["kernel"]
    assert kernels.shape == (3, 8, 2) and not np.allclose(kernels[0], kernels[1])
    for i in range(3):
        jax.tree.map(
            lambda alone, together, i=i: np.testing.assert_allclose(together[i], alone, rtol=1e-6),
            network.init(keys[i]), many,
        )  # fmt: skip
    x = jnp.ones((3, 5, 4))
    np.testing.assert_allclose(
        jax.vmap(network.apply)(many, x)[1], network.apply(network.init(keys[1]), x[1]), rtol=1e-5, atol=1e-6
    )


def test_a_plain_pair_of_functions_is_a_network():
    pair = Network(lambda key: jax.random.normal(key, (4, 2)), lambda params, x: x @ params)
    check_network(pair, SPEC)


class WithState(nnx.Module):
    def __init__(self, make_layer):
        self.layer = make_layer

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "make_layer, named",
    [
        (lambda rngs: nnx.BatchNorm(4, rngs=rngs), r"layer\.mean \(BatchStat\)"),
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), r"layer\.rngs\.count \(RngCount\)"),
        (lambda rngs: nnx.Variable(jnp.ones(2)), r"layer \(Variable\)"),
        (lambda rngs: nnx.data(jnp.ones(2)), r"layer \("),
    ],
)
def test_state_other_than_parameters_is_named_in_the_error(make_layer, named):
    with pytest.raises(ConfigError, match=f"must be nnx.Param only, got .*{named}.*; replace"):
        from_nnx(lambda rngs: WithState(make_layer(rngs)))


@pytest.mark.parametrize(
    "network, got",
    [
        (from_nnx(lambda rngs: UserModule(rngs, actions=3)), r"got float32\[3, 3\]"),
        (from_nnx(lambda rngs: UserModule(rngs, inputs=5)), r"got TypeError: .*first layer"),
        (Network(lambda key: (), lambda params, x: x[:, :2].astype(jnp.int32)), r"got int32\[3, 2\]"),
        (Network(lambda key: (), lambda params, x: x[:, 0]), r"got float32\[3\]"),
        (Network(lambda key: (), lambda params, x: (x[:, :2], x)), r"got \('float32\[3, 2\]', "),
    ],
    ids=["actions", "inputs", "integers", "rank", "tuple"],
)
def test_a_network_that_does_not_fit_the_environment_is_an_error(network, got):
    with pytest.raises(ConfigError, match=rf"(?s)float32\[3, 4\] of small to action values float32\[3, 2\], {got}"):
        check_network(network, SPEC)


class DistributionalModule(nnx.Module):
    """A user's module that returns logits of atoms."""

    def __init__(self, rngs, num_atoms=51):
        self.linear, self.num_atoms = nnx.Linear(4, 2 * num_atoms, rngs=rngs), num_atoms

    def outputs(self, x, draws):
        return self.linear(x).reshape(len(x), 2, self.num_atoms)

    def __call__(self, x):
        return jax.nn.softmax(self.outputs(x, None)) @ np.linspace(-10, 10, self.num_atoms)


def test_a_module_of_the_users_own_learns_distributions_through_its_outputs():
    network, config = from_nnx(DistributionalModule), AgentConfig(head="c51")
    assert check_network(network, SPEC, config) == 4 * 102 + 102
    params, x = network.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 4))
    head = make_head(config)
    np.testing.assert_allclose(head.q_values(network.outputs(params, x, None)), network.apply(params, x), rtol=1e-4)


@pytest.mark.parametrize(
    ("make_module", "settings", "message"),
    [
        (UserModule, {"head": "c51"}, "must have outputs to learn with head c51, got none; give its module a method"),
        (UserModule, {"noisy": True}, "must have outputs to learn with noisy layers, got none"),
        (DistributionalModule, {"head": "c51", "num_atoms": 21}, r"be float32\[3, 2, 21\] .* got float32\[3, 2, 51\]"),
        (DistributionalModule, {"head": "iqn"}, "must suit head iqn, got AttributeError"),
    ],
)
def test_a_network_whose_outputs_do_not_suit_the_head_is_an_error(make_module, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_network(from_nnx(make_module), SPEC, AgentConfig(**settings))
