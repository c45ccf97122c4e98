"""Max pooling, in operations that are fast on a CPU too."""

import jax
import jax.numpy as jnp
from jax import lax


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Returns the greatest value of each `window` x `window` pixels, for each channel.

    The image is padded as XLA pads with "SAME", the odd pixel at the bottom and on the right, and padding is never the
    greatest value. Rows come first and columns second, because two maxima of `window` slices take a third of the time
    of `lax.reduce_window`, whose gradient is slow on a CPU. Of equal values, each may get a share of the gradient.

    Args:
      x: `[batch, height, width, channels]` float.
      window: side of a window, in pixels, at least `stride`.
      stride: pixels between the starts of two windows.

    Returns:
      `[batch, ceil(height / stride), ceil(width / stride), channels]`.
    """
    return _max_along(_max_along(x, 1, window, stride), 2, window, stride)


def _max_along(x: jax.Array, axis: int, window: int, stride: int) -> jax.Array:
    size = x.shape[axis]
    num_windows = -(-size // stride)
    padding = max(0, (num_windows - 1) * stride + window - size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (padding // 2, padding - padding // 2)
    x = jnp.pad(x, widths, constant_values=-jnp.inf)
    end = (num_windows - 1) * stride + 1
    result = lax.slice_in_dim(x, 0, end, stride, axis)
    for start in range(1, window):
        result = jnp.maximum(result, lax.slice_in_dim(x, start, start + end, stride, axis))
    return result


def adaptive_max_pool(x: jax.Array, size: int) -> jax.Array:
    """Returns the greatest value of each of `size` x `size` bins, which cover an image of any size.

    Bin i of a side of n pixels holds those from floor(i n / size) up to, but not including, ceil((i + 1) n / size). So
    bins overlap if `size` doesn't divide the side. This is the rule of PyTorch's `AdaptiveMaxPool2d`.

    Args:
      x: `[batch, height, width, channels]` float.
      size: number of bins on each side.

    Returns:
      `[batch, size, size, channels]`.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        bins = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        x = jnp.concatenate([lax.slice_in_dim(x, *ends, axis=axis).max(axis, keepdims=True) for ends in bins], axis)
    return x
