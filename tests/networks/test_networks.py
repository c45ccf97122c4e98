"""The built-in Q-networks: torsos, normalisation, heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.keys import Draws
from qfleet.core.types import identity
from qfleet.envs.spec import EnvSpec
from qfleet.networks import QNetwork, check_network, make_network
from qfleet.networks.layers import ForwardPass, LayerNorm, NoisyLinear
from qfleet.networks.torsos import choose_torso, earlier_reading, image_shape


def make_spec(shape, dtype=np.float32, frame_stack=1, num_actions=3):
    return EnvSpec(
        name="small",
        observation_shape=shape,
        observation_dtype=np.dtype(dtype),
        num_actions=num_actions,
        frame_stack=frame_stack,
    )


def random_params(network):
    """Returns random parameters, biases and scales included. This takes a fifth of the time of `init`."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 4).astype(leaf.dtype), shapes)


def values_of(network, params, obs):
    """Returns Q-values. Compiled at once, they take a fraction of the time of one operation after another."""
    return jax.jit(network.apply)(params, obs)


VECTOR = make_spec((4,))
SPECS = {
    "vector": (VECTOR, "mlp"),
    "scalar": (make_spec((), np.int32), "mlp"),
    "stacked_vector": (make_spec((4,), frame_stack=3), "mlp"),
    "table_of_floats": (make_spec((10, 5)), "mlp"),
    "tiny_image": (make_spec((4, 9, 2), bool), "mlp"),
    "smallest_minatar": (make_spec((5, 5, 1), bool), "minatar"),
    "minatar": (make_spec((10, 10, 4), bool), "minatar"),
    "largest_minatar": (make_spec((35, 90, 3), np.uint8), "minatar"),
    "smallest_nature": (make_spec((36, 36), np.uint8), "nature"),
    "atari": (make_spec((84, 84), np.uint8, frame_stack=4), "nature"),
    "colour_stack": (make_spec((84, 60, 3), np.uint8, frame_stack=2), "nature"),
}


@pytest.mark.parametrize("case", SPECS)
def test_auto_chooses_the_torso_by_the_shape_of_the_observation(case):
    spec, torso = SPECS[case]
    assert choose_torso(spec, "auto") == torso


CHANNELS_FIRST = {
    "atari": (make_spec((4, 84, 84), np.uint8), (84, 84, 4), "nature"),
    "colour_stack": (make_spec((12, 64, 64), np.uint8), (64, 64, 12), "nature"),
    "minatar": (make_spec((4, 10, 10), bool), (10, 10, 4), "minatar"),
    "wide": (make_spec((3, 120, 160)), (120, 160, 3), "nature"),
    "stacked": (make_spec((3, 40, 44), frame_stack=2), (40, 44, 6), "nature"),
}


@pytest.mark.parametrize("case", CHANNELS_FIRST)
def test_channels_that_come_first_are_moved_last(case):
    spec, image, torso = CHANNELS_FIRST[case]
    assert image_shape(spec) == image and choose_torso(spec, "auto") == torso
    height, width, _ = image
    last = dataclasses.replace(spec, observation_shape=(height, width, spec.observation_shape[0]))
    config = AgentConfig(hidden_sizes=(8,))
    first_network, last_network = make_network(spec, config), make_network(last, config)
    params = random_params(last_network)
    obs = np.random.default_rng(0).integers(0, 2, (2, *spec.agent_observation_shape)).astype(spec.observation_dtype)
    moved = np.moveaxis(obs, 1, 3)
    expected = values_of(last_network, params, moved)
    np.testing.assert_allclose(values_of(first_network, params, obs), expected, rtol=1e-5, atol=1e-5)
    stored, moved = (
        stack_to_storage_layout(network.to_storage_layout, x, spec.frame_stack)
        for network, x in ((first_network, obs), (last_network, moved))
    )
    np.testing.assert_array_equal(stored, moved)
    np.testing.assert_allclose(values_of(first_network, params, stored), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 10, 4), (6, 7, 2), (19, 19, 17), (8, 8, 119), (6, 7, 119), (10, 10, 10)])
def test_channels_that_come_last_stay_there(shape):
    assert image_shape(make_spec(shape)) == shape


def test_a_mlp_leaves_channels_where_they_are():
    network = make_network(make_spec((4, 84, 84), np.uint8), AgentConfig(hidden_sizes=(8,), torso="mlp"))
    assert network.to_storage_layout is identity


@pytest.mark.parametrize(("shape", "torso"), [((84, 84), "nature"), ((84, 84, 3), "nature"), ((4,), "mlp")])
def test_float_pixels_are_divided_by_their_limit(shape, torso):
    bounded = dataclasses.replace(make_spec(shape), pixel_limit=255.0)
    assert choose_torso(bounded, "auto") == torso
    config = AgentConfig(hidden_sizes=(8,))
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    as_bytes, as_floats = make_network(make_spec(shape, np.uint8), config), make_network(bounded, config)
    params = random_params(as_bytes)
    np.testing.assert_allclose(
        values_of(as_floats, params, pixels.astype(np.float32)),
        values_of(as_bytes, params, pixels),
        rtol=1e-5,
        atol=1e-5,
    )


def bounded(shape, limit):
    return dataclasses.replace(make_spec(shape), pixel_limit=limit)


@pytest.mark.parametrize(
    ("spec", "torso", "earlier"),
    [
        *((spec, "auto", "first axis for the height") for spec, _, _ in CHANNELS_FIRST.values()),
        (make_spec((12, 64, 64), np.uint8), "minatar", "first axis for the height"),
        (make_spec((12, 64, 64), np.uint8), "mlp", ""),
        (make_spec((2, 4, 4)), "auto", ""),
        (bounded((84, 84, 3), 255.0), "auto", "now divide them by 255"),
        (bounded((84, 84, 3), 255.0), "mlp", "now divide them by 255"),
        (bounded((10, 10), 255.0), "auto", "now divide them by 255"),
        (bounded((84, 84), 1.0), "auto", "flattened them, and"),
        (bounded((84, 84), 1.0), "mlp", ""),
        (bounded((84, 84), 1.0), "nature", ""),
        (bounded((84, 84, 3), 1.0), "auto", ""),
        *((spec, "auto", "") for spec, _ in SPECS.values()),
    ],
)
def test_observations_that_earlier_runs_read_otherwise_are_known(spec, torso, earlier):
    found = earlier_reading(spec, torso)
    assert earlier in found and bool(earlier) == bool(found)


@pytest.mark.parametrize("shape", [(4, 84, 84, 3), (84, 84, 3, 4), (2, 2, 64, 64, 3)])
def test_stacks_of_images_are_refused_with_the_remedy(shape):
    with pytest.raises(ConfigError, match=r"2 or 3 axes, got .*join the frames of a stack with their channels.* mlp"):
        choose_torso(make_spec(shape, np.uint8), "auto")
    assert choose_torso(make_spec(shape, np.uint8), "mlp") == "mlp"


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("case", SPECS)
def test_every_observation_becomes_one_float_per_action(case, dueling):
    spec, _ = SPECS[case]
    network = make_network(spec, AgentConfig(hidden_sizes=(16, 8), dueling=dueling, layer_norm=True))
    observations = jax.ShapeDtypeStruct((2, *spec.agent_observation_shape), spec.observation_dtype)
    q_values = jax.eval_shape(network.apply, jax.eval_shape(network.init, jax.random.key(0)), observations)
    assert q_values.shape == (2, 3) and q_values.dtype == jnp.float32


def test_the_nature_network_has_the_published_sizes():
    """The network of Mnih et al. 2015 has 1,687,206 parameters with 6 actions."""
    spec = make_spec((84, 84), np.uint8, frame_stack=4, num_actions=6)
    network = make_network(spec, AgentConfig(hidden_sizes=(512,)))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_687_206


def test_no_hidden_layers_leave_a_linear_function_of_the_observation():
    network = make_network(VECTOR, AgentConfig(hidden_sizes=()))
    params = random_params(network)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(values_of(network, params, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (10, 10, 2)])
def test_bytes_are_scaled_to_one_and_other_numbers_are_left_alone(shape):
    config = AgentConfig(hidden_sizes=(8,))
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    as_bytes, as_floats = make_network(make_spec(shape, np.uint8), config), make_network(make_spec(shape), config)
    params = random_params(as_bytes)
    scaled, found = values_of(as_floats, params, (pixels / 255).astype(np.float32)), values_of(as_bytes, params, pixels)
    np.testing.assert_allclose(found, scaled, rtol=1e-5, atol=1e-6)
    assert not np.allclose(values_of(as_floats, params, pixels.astype(np.float32)), found)


def test_stacked_frames_are_channels_of_the_image():
    """A stack of four one-channel frames is an image of four channels."""
    config = AgentConfig(hidden_sizes=(8,))
    stack = np.random.default_rng(0).normal(size=(2, 10, 10, 4)).astype(np.float32)
    stacked = make_network(make_spec((10, 10, 1), frame_stack=4), config)
    plain = make_network(make_spec((10, 10, 4)), config)
    params = random_params(plain)
    expected = values_of(plain, params, stack)
    np.testing.assert_allclose(values_of(stacked, params, stack[:, :, :, None, :]), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_worked_by_hand():
    norm = LayerNorm(4)
    x = jnp.array([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    root = np.sqrt(3.0)
    np.testing.assert_allclose(norm(x), [[-1, 1, -1, 1], [-1 / root, -1 / root, -1 / root, root]], rtol=1e-5)
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    norm.bias[...] = jnp.array([0.0, 0.0, 10.0, 0.0])
    np.testing.assert_allclose(norm(x)[0], [-1, 2, 7, 4], rtol=1e-5)


def test_layer_norm_equals_flax_and_keeps_its_digits_far_from_zero():
    x = jax.random.normal(jax.random.key(0), (5, 64))
    oracle = nnx.LayerNorm(64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(LayerNorm(64)(x), oracle(x), atol=1e-5)
    np.testing.assert_allclose(LayerNorm(64)(x + 1e3), oracle(x), atol=1e-3)


@pytest.mark.parametrize("spec", [VECTOR, make_spec((10, 10, 4))], ids=["mlp", "minatar"])
def test_layer_norm_hides_the_scale_of_every_hidden_layer(spec):
    """With normalisation before each activation, only the scale of the last layer matters."""
    network = make_network(spec, AgentConfig(hidden_sizes=(16, 16), layer_norm=True, dueling=True))
    params = random_params(network)
    x = jax.random.normal(jax.random.key(1), (4, *spec.observation_shape))

    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 7 * leaf if "linear" in [entry.key for entry in path] else leaf, params
    )
    apply = jax.jit(network.apply)
    np.testing.assert_allclose(apply(scaled, x), apply(params, x), atol=1e-4)


def test_dueling_ignores_what_all_advantages_have_in_common_and_adds_the_value():
    network = make_network(VECTOR, AgentConfig(hidden_sizes=(8, 8), dueling=True))
    params = random_params(network)
    x = jax.random.normal(jax.random.key(1), (4, 4))
    apply = jax.jit(network.apply)
    q_values = apply(params, x)
    head = params["head"]
    raised = {**head, "advantage": {**head["advantage"], "bias": head["advantage"]["bias"] + 5}}
    np.testing.assert_allclose(apply({**params, "head": raised}, x), q_values, atol=1e-5)
    richer = {**head, "value": {**head["value"], "bias": head["value"]["bias"] + 5}}
    np.testing.assert_allclose(apply({**params, "head": richer}, x), q_values + 5, atol=1e-5)


def test_dueling_streams_have_their_own_last_hidden_layer():
    params = random_params(make_network(VECTOR, AgentConfig(hidden_sizes=(8, 16), dueling=True)))
    assert params["hidden"]["layers"]["0"]["linear"]["kernel"].shape == (4, 8)
    for stream, outputs in (("value", 1), ("advantage", 3)):
        assert params["head"][f"{stream}_hidden"]["layers"]["0"]["linear"]["kernel"].shape == (8, 16)
        assert params["head"][stream]["kernel"].shape == (16, outputs)


def test_hidden_units_start_with_the_variance_of_their_inputs():
    """He's initialisation keeps the mean square through ReLU layers: it is 1 at the input and about 1 at the output."""
    network = QNetwork(make_spec((256,)), AgentConfig(hidden_sizes=(256,) * 4), nnx.Rngs(0))
    features = network.hidden(jax.random.normal(jax.random.key(1), (512, 256)), ForwardPass())
    assert 0.7 < float((features**2).mean()) < 1.4


@pytest.mark.parametrize(
    "spec, torso, smallest",
    [(VECTOR, "minatar", 3), (VECTOR, "nature", 36), (make_spec((35, 84, 1)), "nature", 36)],
)
def test_a_torso_that_does_not_fit_says_what_it_needs(spec, torso, smallest):
    with pytest.raises(ConfigError, match=f"torso {torso} needs images at least {smallest} .*; give --torso auto"):
        make_network(spec, AgentConfig(torso=torso))


def test_an_image_may_go_through_the_mlp_when_asked():
    spec = make_spec((84, 84), np.uint8, frame_stack=2)
    params = jax.eval_shape(make_network(spec, AgentConfig(torso="mlp")).init, jax.random.key(0))
    assert params["hidden"]["layers"]["0"]["linear"]["kernel"].shape == (84 * 84 * 2, 128)


def test_the_lowering_of_convolutions_changes_no_q_value():
    spec = make_spec((36, 36), np.uint8, frame_stack=4)
    patches, native = (
        make_network(spec, AgentConfig(convolution=name, hidden_sizes=(16,))) for name in ("patches", "native")
    )
    params = random_params(patches)
    x = np.random.default_rng(0).integers(0, 256, (3, 36, 36, 4)).astype(np.uint8)
    found, expected = values_of(patches, params, x), values_of(native, params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def nature_by_pixels(params, x):
    """Returns the Q-values of the Nature network as published: strided convolutions of images, frames as channels."""
    x = x.astype(jnp.float32).reshape(*x.shape[:3], -1) / 255
    for i, stride in enumerate((4, 2, 1)):
        layer = params["torso"]["convolutions"][str(i)]["linear"]
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
    dense = params["hidden"]["layers"]["0"]["linear"]
    x = jax.nn.relu(x.reshape(len(x), -1) @ dense["kernel"] + dense["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


IMAGES = {"grey": ((40, 36), 3), "colour": ((36, 44, 3), 1), "colour_stack": ((36, 44, 3), 2)}


@pytest.mark.parametrize("lowering", ["patches", "native"])
@pytest.mark.parametrize("case", IMAGES)
def test_stored_frames_give_the_q_values_and_gradients_of_raw_ones(case, lowering):
    shape, frame_stack = IMAGES[case]
    spec = make_spec(shape, np.uint8, frame_stack)
    network = make_network(spec, AgentConfig(convolution=lowering, hidden_sizes=(16,)))
    params = jax.tree.map(lambda leaf: leaf / 4, random_params(network))
    raw = np.random.default_rng(0).integers(0, 256, (3, *spec.agent_observation_shape)).astype(np.uint8)
    stored = stack_to_storage_layout(network.to_storage_layout, jnp.asarray(raw), frame_stack)
    channels = 16 * (3 if len(shape) == 3 else 1)
    assert stored.shape[1:4] == (channels, shape[0] // 4, shape[1] // 4) and stored.dtype == np.uint8

    def value_and_gradients(apply, x):
        def loss(params):
            q = apply(params, x)
            return jnp.sin(q).sum(), q

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = value_and_gradients(nature_by_pixels, raw)
    for x in (raw, stored):
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max()),
            value_and_gradients(network.apply, x),
            expected,
        )


@pytest.mark.parametrize("case", ["vector", "minatar", "largest_minatar", "odd_sides"])
def test_other_observations_are_stored_as_they_come(case):
    spec = make_spec((42, 84), np.uint8) if case == "odd_sides" else SPECS[case][0]
    assert make_network(spec, AgentConfig()).to_storage_layout is identity


HEADS = [
    {"head": "c51", "num_atoms": 11},
    {"head": "qr", "num_quantiles": 11, "dueling": True},
    {"head": "iqn", "num_quantiles": 5},
    {"head": "iqn", "num_quantiles": 5, "dueling": True, "noisy": True},
    {"head": "hl_gauss", "noisy": True},
    {"noisy": True, "dueling": True},
]


@pytest.mark.parametrize("settings", HEADS, ids=str)
@pytest.mark.parametrize("shape", [(4,), (10, 10, 3)], ids=str)
def test_every_head_gives_values_for_each_action_and_shows_its_hidden_layers(settings, shape):
    config, spec = AgentConfig(hidden_sizes=(16, 8), **settings), make_spec(shape)
    network = make_network(spec, config)
    assert check_network(network, spec, config) > 0
    params, obs = jax.jit(network.init)(jax.random.key(0)), jax.random.uniform(jax.random.key(1), (3, *shape))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params)), "a learner step would be compiled twice"
    q, activations = jax.jit(network.with_activations)(params, obs)
    np.testing.assert_allclose(q, values_of(network, params, obs), rtol=1e-5, atol=1e-6)
    streams = 2 if settings.get("dueling") else 1
    assert [layer.shape[-1] for layer in activations][-streams:] == [8] * streams


def test_noise_is_what_the_paper_says_and_the_mean_without():
    """The noise of a kernel is the product of a number for each input and one for each unit."""
    layer = NoisyLinear(3, 2, 0.5, nnx.Rngs(0))
    bound = 1 / np.sqrt(3)
    np.testing.assert_allclose(layer.kernel_std[...], 0.5 * bound, rtol=1e-6)
    assert np.all(np.abs(layer.kernel[...]) <= bound) and np.all(np.abs(layer.bias[...]) <= bound)
    x, key = jax.random.normal(jax.random.key(1), (4, 3)), jax.random.key(2)
    noise = np.asarray(jax.random.normal(key, (5,)))
    noise = np.sign(noise) * np.sqrt(np.abs(noise))
    kernel = layer.kernel[...] + layer.kernel_std[...] * np.outer(noise[:3], noise[3:])
    expected = x @ kernel + layer.bias[...] + layer.bias_std[...] * noise[3:]
    outputs = jax.jit(lambda x, key: layer(x, key))
    np.testing.assert_allclose(outputs(x, key), expected, rtol=1e-5)
    np.testing.assert_allclose(outputs(x, None), x @ layer.kernel[...] + layer.bias[...], rtol=1e-5)
    each = jax.random.split(jax.random.key(3), 4)
    one_by_one = [outputs(x[i : i + 1], each[i])[0] for i in range(4)]
    np.testing.assert_allclose(outputs(x, each), one_by_one, rtol=1e-4, atol=1e-6)


def test_fractions_are_drawn_for_each_sample_or_spaced_evenly():
    spec, config = make_spec((4,)), AgentConfig(head="iqn", num_quantiles=5, num_acting_quantiles=4)
    network = make_network(spec, config)
    params, obs, outputs = jax.jit(network.init)(jax.random.key(0)), jnp.ones((3, 4)), jax.jit(network.outputs)
    evenly = outputs(params, obs, None)
    np.testing.assert_allclose(evenly.fraction, [[0.125, 0.375, 0.625, 0.875]] * 3)
    drawn = outputs(params, obs, Draws(jax.random.key(0), jax.random.split(jax.random.key(1), 3)))
    assert drawn.value.shape == (3, spec.num_actions, 5) and len(np.unique(drawn.fraction)) == 15
