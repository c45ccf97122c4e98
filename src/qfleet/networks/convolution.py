"""Convolution, lowered to what the platform runs fast."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qfleet.config import ConfigError

Lowering = Literal["auto", "patches", "native"]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    lowering: Lowering = "auto",
    bias: jax.Array | None = None,
) -> jax.Array:
    """Returns the convolution of a batch of images with `kernel`, without padding, plus a bias.

    Both lowerings give the same numbers, up to rounding. Inside a compiled loop XLA's CPU backend computes the
    gradients of a native convolution 10 to 40 times slower than those of patches times a matrix.

    Args:
      x: `[batch, height, width, channels]` float.
      kernel: `[kernel_height, kernel_width, channels, features]` float.
      strides: down and across, in pixels.
      lowering: `patches` times a matrix, `native`, or `auto`: patches where the program is compiled for a CPU,
        native elsewhere. The other one leaves no trace in the compiled program.
      bias: `[features]`, none by default.

    Returns:
      `[batch, (height - kernel_height) // down + 1, (width - kernel_width) // across + 1, features]` float.
    Raises:
      ConfigError: if the kernel is larger than the image, or made for another number of channels.
    """
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
    """Returns images whose blocks of `size` x `size` pixels have become channels of one pixel ("space to depth").

    Args:
      x: `[..., height, width, channels]`, with sides that `size` divides.
      size: of a block, in pixels.

    Returns:
      `[..., height // size, width // size, size * size * channels]`: row in the block, column, channel.
    """
    *batch, height, width, channels = x.shape
    x = x.reshape(*batch, height // size, size, width // size, size, channels).swapaxes(-4, -3)
    return x.reshape(*batch, height // size, width // size, -1)


def kernel_of_blocks(kernel: jax.Array, size: int) -> jax.Array:
    """Returns the kernel that does to blocks, by strides of 1, what `kernel` does to pixels by strides of `size`."""
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
        x = x[:, : (rows - 1) * down + height, : (columns - 1) * down + width]  # what no patch reaches may not divide
        return _features_by_pixels(to_blocks(x, down), kernel_of_blocks(kernel, down), bias)
    shifted = [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    matrix = kernel.reshape(-1, features)  # rows ordered as the patches are: row, column, channel
    # Two dimensions, not four: the kernel's gradient is then one plain matrix product, and 1.5 times as fast.
    patches = jnp.concatenate(shifted, axis=-1).reshape(batch * rows * columns, -1)
    return (patches @ matrix + bias).reshape(batch, rows, columns, features)


def _features_by_pixels(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the convolution by strides of 1 as one product of matrices that have pixels as columns.

    All three products, those of the gradients too, then have forms that XLA's CPU backend has its fastest code for:
    with pixels as rows the kernel's gradient takes twice as long. The transpositions cost nothing between layers,
    for XLA lays the arrays out as they are wanted. The bias is added here, for XLA would otherwise merge the last
    transposition with the product, and turn that around.
    """
    height, width, channels, features = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    x = x.transpose(3, 0, 1, 2)
    shifted = [x[:, :, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    patches = jnp.concatenate(shifted).reshape(height * width * channels, -1)
    y = kernel.reshape(-1, features).T @ patches + bias[:, None]
    return y.reshape(features, -1, rows, columns).transpose(1, 2, 3, 0)
