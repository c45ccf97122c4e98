"""The torsos with stages: IMPALA's residual network with BTR's options, and Hadamax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.types import EnvSpec, identity
from qfleet.networks import make_network
from qfleet.networks.layers import Convolution, spectral_norm

BTR = {"torso": "impala", "spectral_norm": True}


def make_spec(shape, dtype=np.uint8, frame_stack=1):
    return EnvSpec(
        name="small", observation_shape=shape, observation_dtype=np.dtype(dtype), num_actions=3, frame_stack=frame_stack
    )


def random_params(network):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 4).astype(leaf.dtype), shapes)


def random_obs(spec, batch=2):
    return np.random.default_rng(0).integers(0, 256, (batch, *spec.agent_observation_shape)).astype(np.uint8)


def num_params(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def convolved(x, layer, kernel=None):
    kernel = layer["kernel"] if kernel is None else kernel
    return (
        lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + layer["bias"]
    )


def pooled(x, window, stride):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "SAME")


def normalised(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * norm["scale"] + norm["bias"]


def last_layer(x, params):
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def impala_as_published(params, obs, has_spectral_norm):
    """Returns Q-values without hidden layers, from XLA's convolutions and pooling and NumPy's spectral norms."""
    x = obs / 255
    for i in range(3):
        stage = params["torso"]["convolutions"][str(i)]
        x = pooled(convolved(x, stage["convolution"]), 3, 2)
        for j in range(2):
            change = x
            for k in range(2):
                layer = stage["blocks"][str(j)]["convolutions"][str(k)]
                kernel = np.asarray(layer["kernel"])
                norm = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2) if has_spectral_norm else 1
                change = convolved(jax.nn.relu(change), layer, kernel / norm)
            x = x + change
    return last_layer(jax.nn.relu(x).reshape(len(x), -1), params)


@pytest.mark.parametrize(("has_spectral_norm", "lowering"), [(False, "patches"), (True, "native")])
def test_impala_is_the_published_network(has_spectral_norm, lowering):
    spec = make_spec((9, 10, 2))
    config = AgentConfig(torso="impala", spectral_norm=has_spectral_norm, hidden_sizes=(), convolution=lowering)
    network = make_network(spec, config)
    params, obs = random_params(network), random_obs(spec)
    expected = jax.jit(lambda obs: impala_as_published(params, obs, has_spectral_norm))(obs)
    np.testing.assert_allclose(
        jax.jit(network.apply)(params, obs), expected, rtol=2e-4, atol=2e-4 * abs(expected).max()
    )


def hadamax_as_published(params, obs):
    """Returns the Q-values of the published program, with one dense layer, from XLA's convolutions and pooling."""
    x = obs / 255
    for i, (window, stride) in enumerate(((4, 4), (2, 2), (3, 1))):
        stage = params["torso"]["convolutions"][str(i)]
        both = jnp.split(convolved(x, stage["convolution"]), 2, axis=-1)
        first, second = (jax.nn.gelu(normalised(y, stage["norms"][str(j)])) for j, y in enumerate(both))
        x = pooled(first * second, window, stride)
    dense = params["hidden"]["layers"]["0"]
    x = x.reshape(len(x), -1) @ dense["linear"]["kernel"] + dense["linear"]["bias"]
    return last_layer(jax.nn.gelu(normalised(x, dense["norm"])), params)


@pytest.mark.parametrize("lowering", ["patches", "native"])
def test_hadamax_is_the_published_network(lowering):
    spec = make_spec((17, 20, 2))
    config = AgentConfig(torso="hadamax", layer_norm=True, hidden_sizes=(8,), convolution=lowering)
    network = make_network(spec, config)
    params, obs = random_params(network), random_obs(spec)
    expected = jax.jit(hadamax_as_published)(params, obs)
    np.testing.assert_allclose(jax.jit(network.apply)(params, obs), expected, rtol=2e-4, atol=2e-4)


def test_the_published_sizes():
    """Worked by hand for 84 x 84 images of four frames, three actions and the papers' dense layers."""
    spec = make_spec((84, 84), frame_stack=4)

    def count(**settings):
        return num_params(jax.eval_shape(make_network(spec, AgentConfig(**settings)).init, jax.random.key(0)))

    def stage(channels, features):
        return 9 * channels * features + features + 4 * (9 * features * features + features)

    dense = 11 * 11 * 32 * 256 + 256 + 256 * 3 + 3
    assert count(torso="impala", hidden_sizes=(256,)) == stage(4, 16) + stage(16, 32) + stage(32, 32) + dense
    wide = stage(4, 32) + stage(32, 64) + stage(64, 64) + 6 * 6 * 64 * 512 + 512 + 512 * 3 + 3
    assert count(**BTR, torso_width=2, adaptive_pooling=6, hidden_sizes=(512,)) == wide
    convolutions = 2 * ((64 * 4 + 1) * 32 + (16 * 32 + 1) * 64 + (9 * 64 + 1) * 64)
    norms = 2 * 2 * (32 + 64 + 64) + 2 * 512
    dense = 11 * 11 * 64 * 512 + 512 + 512 * 3 + 3
    assert count(torso="hadamax", layer_norm=True, hidden_sizes=(512,)) == convolutions + norms + dense


@pytest.mark.parametrize("torso", ["minatar", "nature", "impala", "hadamax"])
def test_the_width_multiplies_the_channels_of_every_convolution(torso):
    spec = make_spec((36, 36, 2))
    narrow, wide = (
        jax.eval_shape(make_network(spec, AgentConfig(torso=torso, torso_width=width)).init, jax.random.key(0))["torso"]
        for width in (1, 3)
    )
    assert jax.tree.leaves(narrow)
    for (path, one), three in zip(jax.tree.leaves_with_path(narrow), jax.tree.leaves(wide), strict=True):
        assert three.shape[-1] == 3 * one.shape[-1], path


SETTINGS = {
    "impala": ((9, 9), {"torso": "impala"}),
    "btr": ((17, 18), dict(**BTR, adaptive_pooling=2, torso_width=2)),
    "hadamax": ((17, 17), {"torso": "hadamax", "layer_norm": True}),
}


@pytest.mark.parametrize("case", ["btr", "hadamax"])
def test_patches_and_native_convolutions_give_the_same_values_and_gradients(case):
    image, settings = SETTINGS[case]
    spec = make_spec((*image, 2))

    def value_and_gradients(lowering):
        network = make_network(spec, AgentConfig(**settings, hidden_sizes=(8,), convolution=lowering))
        params, obs = random_params(network), random_obs(spec)

        def loss(params):
            q = network.apply(params, obs)
            return (q / 8).sum(), q

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    native = value_and_gradients("native")
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(native))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max()),
        value_and_gradients("patches"), native,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["impala", "hadamax"])
def test_channels_first_and_stacks_of_frames_are_read_as_channels(case):
    (height, width), settings = SETTINGS[case]
    config = AgentConfig(**settings, hidden_sizes=(8,), convolution="native")
    last, first = make_spec((height, width, 2)), make_spec((2, height, width))
    stacked = make_spec((height, width), frame_stack=2)
    network = make_network(last, config)
    assert network.to_storage_layout is identity
    params, obs = random_params(network), random_obs(last)
    expected = jax.jit(network.apply)(params, obs)
    for spec, seen in ((first, np.moveaxis(obs, 3, 1)), (stacked, obs)):
        other = make_network(spec, config)
        stored = stack_to_storage_layout(other.to_storage_layout, jnp.asarray(seen), spec.frame_stack)
        np.testing.assert_array_equal(stored, obs)
        np.testing.assert_allclose(jax.jit(other.apply)(params, seen), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("torso", "smallest"), [("impala", 9), ("hadamax", 17)])
def test_a_smaller_image_than_the_kernels_take_is_refused(torso, smallest):
    make_network(make_spec((smallest, smallest, 1)), AgentConfig(torso=torso))
    for shape in ((smallest - 1, 84, 1), (4,)):
        with pytest.raises(ConfigError, match=f"torso {torso} needs images at least {smallest} .*; give --torso auto"):
            make_network(make_spec(shape), AgentConfig(torso=torso))


def test_more_bins_than_pixels_are_refused_with_the_remedy():
    config = AgentConfig(**BTR, adaptive_pooling=6)
    assert jax.eval_shape(make_network(make_spec((41, 84)), config).init, jax.random.key(0))
    with pytest.raises(
        ConfigError, match="adaptive_pooling must be .*, got 6 for a map of 5 x 11 .*adaptive_pooling=5"
    ):
        make_network(make_spec((40, 84)), config)


@pytest.mark.parametrize("singular_values", ["random", "equal", "close", "spread"])
def test_the_spectral_norm_of_a_kernel_is_that_of_numpy(singular_values):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 32, 64)).astype(np.float32)
    u, s, v = np.linalg.svd(kernel.reshape(-1, 64), full_matrices=False)
    s = {"random": s, "equal": 0 * s + 3, "close": np.linspace(0.99, 1, 64), "spread": np.geomspace(1e-6, 1e-3, 64)}[
        singular_values
    ]
    kernel = ((u * s) @ v).astype(np.float32).reshape(kernel.shape)
    as_pytorch = kernel.transpose(3, 2, 0, 1).reshape(64, -1).astype(np.float64)
    np.testing.assert_allclose(jax.jit(spectral_norm)(kernel), np.linalg.norm(as_pytorch, 2), rtol=0.002)


def test_the_gradient_of_the_spectral_norm_is_the_product_of_its_vectors():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)
    u, _, v = np.linalg.svd(kernel.reshape(-1, 5), full_matrices=False)
    gradient = jax.jit(jax.grad(spectral_norm))(kernel)
    np.testing.assert_allclose(gradient.reshape(-1, 5), np.outer(u[:, 0], v[0]), atol=1e-5)


def test_a_kernel_of_zeros_has_the_norm_zero_and_finite_gradients():
    value, gradient = jax.jit(jax.value_and_grad(spectral_norm))(jnp.zeros((3, 3, 2, 4)))
    assert value == 0 and np.isfinite(gradient).all()
    graph, params = nnx.split(Convolution(2, 4, 3, AgentConfig(), nnx.Rngs(0), spectral_norm=True))
    params = jax.tree.map(jnp.zeros_like, params)
    gradients = jax.jit(jax.grad(lambda params: nnx.merge(graph, params)(jnp.ones((1, 4, 4, 2))).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_spectral_norm_hides_the_scale_of_the_residual_kernels_alone():
    spec = make_spec((9, 9, 1))
    network = make_network(spec, AgentConfig(**BTR, hidden_sizes=(), convolution="native"))
    params, obs, apply = random_params(network), random_obs(spec), jax.jit(network.apply)

    def scaled(params, part):
        def scale(path, leaf):
            names = [getattr(entry, "key", None) for entry in path]
            return 7 * leaf if part in names and names[-1] == "kernel" else leaf

        return jax.tree.map_with_path(scale, params)

    expected = apply(params, obs)
    np.testing.assert_allclose(apply(scaled(params, "blocks"), obs), expected, rtol=1e-4, atol=1e-3)
    assert not np.allclose(apply(scaled(params, "convolution"), obs), expected, rtol=0.1)


def test_layer_norm_leaves_the_convolutions_of_impala_alone():
    spec = make_spec((9, 9, 1))
    params = jax.eval_shape(make_network(spec, AgentConfig(torso="impala", layer_norm=True)).init, jax.random.key(0))
    assert "norm" in params["hidden"]["layers"]["0"] and "norm" not in str(jax.tree.structure(params["torso"]))


@pytest.mark.parametrize(("torso", "num_layers"), [("impala", 13 + 2), ("hadamax", 3 + 2)])
def test_the_outputs_of_all_hidden_layers_are_shown(torso, num_layers):
    spec = make_spec((17, 17, 1))
    network = make_network(spec, AgentConfig(torso=torso, hidden_sizes=(8, 8)))
    shown = jax.eval_shape(network.with_activations, jax.eval_shape(network.init, jax.random.key(0)), random_obs(spec))
    assert len(shown[1]) == num_layers


def test_initial_parameters_of_the_earlier_torsos_have_not_changed():
    """The sums are those of the release before there were stages."""
    sums = {
        ("minatar", (10, 10, 4)): [0.488958, 0.896058, -1.004257],
        ("nature", (36, 36)): [1.710304, -0.995573, 1.539113, -0.154796, -1.440145],
    }
    for (torso, shape), expected in sums.items():
        network = make_network(make_spec(shape), AgentConfig(torso=torso, hidden_sizes=(8,)))
        params = jax.jit(network.init)(jax.random.key(0))
        found = [float(np.sum(np.asarray(leaf)[..., 0])) for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
