"""Compares the two lowerings of a convolution, and checks which of them a program contains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.networks import convolve
from qfleet.networks.convolution import to_blocks

CASES = {  # image height, width, channels; kernel height, width, features; strides
    "minatar": ((10, 10, 4), (3, 3, 16), (1, 1)),
    "nature_first": ((84, 84, 4), (8, 8, 32), (4, 4)),
    "nature_second": ((20, 20, 32), (4, 4, 64), (2, 2)),
    "nature_third": ((9, 9, 64), (3, 3, 64), (1, 1)),
    "remainder_left_over": ((11, 14, 3), (4, 4, 5), (2, 2)),
    "stride_does_not_divide_kernel": ((12, 13, 2), (3, 5, 4), (2, 2)),
    "strides_differ": ((9, 12, 2), (2, 6, 3), (1, 3)),
    "stride_above_kernel": ((9, 9, 2), (2, 2, 3), (3, 3)),
    "one_pixel": ((4, 5, 3), (1, 1, 2), (1, 1)),
    "kernel_is_image": ((5, 4, 2), (5, 4, 3), (1, 1)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_patches_give_the_values_and_gradients_of_the_native_convolution(case):
    image, kernel, strides = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *image)).astype(np.float32)
    k = rng.normal(size=(*kernel[:2], image[2], kernel[2])).astype(np.float32)
    k /= np.sqrt(k[..., 0].size)

    def value_and_gradients(x, k, lowering):
        y, pull_back = jax.vjp(lambda x, k: convolve(x, k, strides, lowering), x, k)
        return y, *pull_back(jnp.sin(y) / np.sqrt(y.size))

    with jax.default_matmul_precision("highest"):  # by default a GPU rounds factors to 10 bits (TF32)
        patches, native = (jax.jit(value_and_gradients, static_argnums=2)(x, k, name) for name in ("patches", "native"))
    # cuDNN may choose Winograd's algorithm, which rounds more often.
    tolerance = 1e-5 if jax.default_backend() == "cpu" else 1e-4
    for ours, oracle in zip(patches, native, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=tolerance, atol=tolerance)


def test_a_convolution_worked_by_hand_is_a_correlation_without_padding():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    k = jnp.array([[1.0, 0.0], [0.0, 10.0]]).reshape(2, 2, 1, 1)
    expected = [[0 + 50, 1 + 60, 2 + 70], [4 + 90, 5 + 100, 6 + 110]]
    for lowering in ("patches", "native", "auto"):
        np.testing.assert_array_equal(convolve(x, k, (1, 1), lowering)[0, :, :, 0], expected)


@pytest.mark.parametrize("lowering", ["patches", "native"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (8, 8), (2, 5)])
def test_padding_of_the_same_size_is_that_of_xla(kernel, lowering):
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(2, 6, 7, 3)).astype(np.float32), rng.normal(size=(*kernel, 3, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(convolve(x, k, (1, 1), lowering, None, "same"), expected, rtol=1e-4, atol=1e-4)


def test_auto_compiles_to_the_wanted_lowering_alone():
    """In a scan of vmapped gradients, as in training, no branch on the platform is left in the program."""
    kernels = jnp.ones((2, 3, 3, 4, 8))
    images = jnp.ones((3, 5, 10, 10, 4))

    def train(kernels, images, lowering):
        def step(kernels, x):
            gradient = jax.grad(lambda k: convolve(x, k, (1, 1), lowering).var())
            return kernels - jax.vmap(gradient)(kernels), None

        return jax.lax.scan(step, kernels, images)[0]

    def lower(lowering, platform):
        program = jax.jit(train, static_argnums=2).trace(kernels, images, lowering)
        return program.lower(lowering_platforms=(platform,))

    compiled = lower("auto", "cpu").compile().as_text()
    assert " convolution(" not in compiled and "conditional(" not in compiled
    assert compiled.count(" dot(") == lower("patches", "cpu").compile().as_text().count(" dot(") > 0
    on_gpu = lower("auto", "cuda").as_text()
    assert "stablehlo.convolution" in on_gpu and "stablehlo.concatenate" not in on_gpu


@pytest.mark.parametrize("lowering", ["patches", "native", "auto"])
@pytest.mark.parametrize("kernel", [(5, 3, 2, 1), (3, 5, 2, 1), (3, 3, 1, 1)])
def test_a_kernel_that_does_not_fit_the_image_is_an_error(kernel, lowering):
    with pytest.raises(ConfigError, match="kernel must fit"):
        convolve(jnp.ones((1, 4, 4, 2)), jnp.ones(kernel), (1, 1), lowering)


def test_blocks_worked_by_hand():
    """The numbers are those of a 2 x 4 image with two channels: first its left block, then its right block."""
    x = jnp.arange(16).reshape(2, 4, 2)
    np.testing.assert_array_equal(to_blocks(x, 2), [[[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]])
