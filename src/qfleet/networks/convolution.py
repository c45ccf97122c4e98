"""Convolution, lowered to the operations that are fast on the platform."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qfleet.config import ConfigError

Lowering = Literal["auto", "patches", "native"]
Padding = Literal["valid", "same"]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    lowering: Lowering = "auto",
    bias: jax.Array | None = None,
    padding: Padding = "valid",
) -> jax.Array:
    """Returns the convolution of a batch of images with `kernel`, plus a bias.

    Both lowerings give the same numbers, up to rounding. Inside a compiled loop, XLA's CPU backend takes 10 to 40 times
    longer for the gradients of a native convolution than for those of patches times a matrix.

    Args:
      x: `[batch, height, width, channels]` float.
      kernel: `[kernel_height, kernel_width, channels, features]` float.
      strides: the strides down and across, in pixels.
      lowering: `patches` (patches times a matrix), `native` (XLA's convolution), or `auto`, which is `patches` if the
        program is compiled for a CPU and `native` otherwise. The unused one isn't part of the compiled program.
      bias: `[features]`; no bias by default.
      padding: `valid` (none), or `same`, which adds zeros so that a kernel with a stride of 1 leaves the image's size,
        the odd one at the bottom and on the right.

    Returns:
      `[batch, (height - kernel_height) // down + 1, (width - kernel_width) // across + 1, features]` float, of the
      padded height and width.
    Raises:
      ConfigError: if the kernel is larger than the image, or is made for another number of channels.
    """
    if padding == "same":
        above, left = (kernel.shape[0] - 1) // 2, (kernel.shape[1] - 1) // 2
        x = jnp.pad(x, ((0, 0), (above, kernel.shape[0] // 2), (left, kernel.shape[1] // 2), (0, 0)))
    if kernel.shape[0] > x.shape[1] or kernel.shape[1] > x.shape[2] or kernel.shape[2] != x.shape[3]:
        raise ConfigError(
            f"a convolution's kernel must fit in the image and have its channels, got kernel {kernel.shape} (height, "
            f"width, channels, features) on images {x.shape[1:]}; choose another torso, or larger images"
        )
    bias = jnp.zeros(kernel.shape[3]) if bias is None else bias
    match lowering:
        case "patches":
            return _patches_times_matrix(x, kernel, bias, strides)
        case "native":
            return _native(x, kernel, bias, strides)
        case "auto":
            return lax.platform_dependent(
                x,
                kernel,
                bias,
                cpu=functools.partial(_patches_times_matrix, strides=strides),
                default=functools.partial(_native, strides=strides),
            )


def to_blocks(x: jax.Array, size: int) -> jax.Array:
    """Returns images in which each block of `size` x `size` pixels has become the channels of one pixel.

    This is also called "space to depth".

    Args:
      x: `[..., height, width, channels]`. `size` must divide the height and the width.
      size: side of a block, in pixels.

    Returns:
      `[..., height // size, width // size, size * size * channels]`. The new channels are ordered by row in the
      block, column in the block, and channel.
    """
    *batch, height, width, channels = x.shape
    x = x.reshape(*batch, height // size, size, width // size, size, channels).swapaxes(-4, -3)
    return x.reshape(*batch, height // size, width // size, -1)


def kernel_of_blocks(kernel: jax.Array, size: int) -> jax.Array:
    """Returns the kernel that, with a stride of 1 over blocks, equals `kernel` with a stride of `size` over pixels."""
    height, width, channels, features = kernel.shape
    kernel = kernel.reshape(height // size, size, width // size, size, channels, features).swapaxes(1, 2)
    return kernel.reshape(height // size, width // size, -1, features)


def _native(x: jax.Array, kernel: jax.Array, bias: jax.Array, strides: tuple[int, int]) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias


def _patches_times_matrix(x: jax.Array, kernel: jax.Array, bias: jax.Array, strides: tuple[int, int]) -> jax.Array:
    if strides == (1, 1):
        return _features_by_pixels(x, kernel, bias)
    batch, image_height, image_width, _ = x.shape
    height, width, _, features = kernel.shape
    down, across = strides
    rows = (image_height - height) // down + 1
    columns = (image_width - width) // across + 1
    if down == across and height % down == 0 and width % down == 0:
        # Without the pixels that no patch reaches, the blocks divide the image.
        x = x[:, : (rows - 1) * down + height, : (columns - 1) * down + width]
        return _features_by_pixels(to_blocks(x, down), kernel_of_blocks(kernel, down), bias)
    shifted = [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    matrix = kernel.reshape(-1, features)  # its rows are ordered as the patches are: row, column, channel
    # With two dimensions, not four, the kernel's gradient is one plain matrix product, which is 1.5 times as fast.
    patches = jnp.concatenate(shifted, axis=-1).reshape(batch * rows * columns, -1)
    return (patches @ matrix + bias).reshape(batch, rows, columns, features)


def _features_by_pixels(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the convolution with a stride of 1, as one product of matrices that have pixels as columns.

    All three products, including those of the gradients, then have a form for which XLA's CPU backend has its fastest
    code. With pixels as rows, the kernel's gradient takes twice as long. The transpositions cost nothing between
    layers, because XLA chooses the layout of the arrays to suit. The bias is added here because XLA would otherwise
    merge the last transposition with the product, and compute the product with pixels as rows after all.
    """
    height, width, channels, features = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    x = x.transpose(3, 0, 1, 2)
    shifted = [x[:, :, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    patches = jnp.concatenate(shifted).reshape(height * width * channels, -1)
    y = kernel.reshape(-1, features).T @ patches + bias[:, None]
    return y.reshape(features, -1, rows, columns).transpose(1, 2, 3, 0)
