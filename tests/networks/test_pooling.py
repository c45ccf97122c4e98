"""Max pooling, against XLA's own and against slow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qfleet.networks.pooling import adaptive_max_pool, max_pool


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (4, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("image", [(8, 9), (11, 5), (1, 2)])
def test_pooling_gives_the_values_and_gradients_of_xla(window, stride, image):
    x = np.random.default_rng(0).normal(size=(2, *image, 3)).astype(np.float32)  # without equal values
    slopes = np.random.default_rng(1).normal(size=(2, *(-(-side // stride) for side in image), 3)).astype(np.float32)

    @jax.jit
    def values_and_gradients(x, slopes):
        pools = (
            lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "SAME"),
            lambda x: max_pool(x, window, stride),
        )
        both = [jax.vjp(pool, x) for pool in pools]
        return [(value, pull_back(slopes)[0]) for value, pull_back in both]

    (expected, expected_gradient), (found, gradient) = values_and_gradients(x, slopes)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_equal_values_share_a_gradient_that_is_finite():
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 3, 2).sum()))(jnp.zeros((1, 5, 6, 1)))
    assert np.isfinite(gradient).all() and float(gradient.sum()) == pytest.approx(3 * 3)


def slow_adaptive_max_pool(x, size):
    """Returns PyTorch's adaptive max pooling, one bin after another."""
    _, height, width, _ = x.shape
    result = np.empty((len(x), size, size, x.shape[3]), x.dtype)
    for i in range(size):
        for j in range(size):
            top, bottom = int(np.floor(i * height / size)), int(np.ceil((i + 1) * height / size))
            left, right = int(np.floor(j * width / size)), int(np.ceil((j + 1) * width / size))
            result[:, i, j] = x[:, top:bottom, left:right].max((1, 2))
    return result


@pytest.mark.parametrize(("image", "size"), [((11, 11), 6), ((6, 6), 6), ((12, 7), 6), ((13, 8), 5), ((9, 4), 1)])
def test_adaptive_pooling_has_the_bins_of_pytorch(image, size):
    x = np.random.default_rng(0).normal(size=(2, *image, 3)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: adaptive_max_pool(x, size))(x), slow_adaptive_max_pool(x, size))


def test_adaptive_pooling_worked_by_hand():
    """Five pixels in three bins: the first two, the middle three, the last two."""
    x = jnp.tile(jnp.array([5.0, 1.0, 2.0, 3.0, 4.0])[:, None], (1, 5))[None, :, :, None]
    np.testing.assert_array_equal(adaptive_max_pool(x, 3)[0, :, 0, 0], [5, 3, 4])
