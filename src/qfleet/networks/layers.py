"""Layers that torsos and heads are made of, and what one forward pass draws and shows."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qfleet.config import AgentConfig
from qfleet.core.keys import Draws
from qfleet.networks.convolution import Padding, convolve, kernel_of_blocks

_HE = nnx.initializers.he_normal()
_NUM_SQUARINGS = 10
_TINY = 1e-30


class ForwardPass:
    """What one forward pass draws, and what it shows of its hidden layers."""

    def __init__(self, draws: Draws | None = None, *, shows: bool = False) -> None:
        """Begins a pass; it draws nothing without `draws`, and `shows` keeps the output of each hidden layer."""
        self.draws = draws
        self.seen: list[jax.Array] | None = [] if shows else None
        """The output of each hidden layer so far, `[batch, ..., units]`."""
        self._num_keys = 0

    def show(self, x: jax.Array) -> None:
        """Notes the output of a hidden layer."""
        if self.seen is not None:
            self.seen.append(x)

    def noise_key(self) -> jax.Array | None:
        """Returns the key of the next noisy layer, `[]` for all samples or `[batch]`; None if there is no noise."""
        if self.draws is None:
            return None
        self._num_keys += 1
        keys, number = self.draws.noise, np.uint32(self._num_keys)
        return jax.vmap(jax.random.fold_in, (0, None))(keys, number) if keys.ndim else jax.random.fold_in(keys, number)


class LayerNorm(nnx.Module):
    """Normalises the last axis to mean 0 and variance 1, then scales and shifts each unit (Ba et al. 2016).

    On a CPU, in a compiled loop, the gradients of a small network (512 x 64 units) take 6-11 % less time than with
    `nnx.LayerNorm`. The variance is computed from centred values, so it stays accurate for large activations.
    """

    def __init__(self, num_features: int) -> None:
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred * lax.rsqrt(variance + 1e-6) * self.scale[...] + self.bias[...]


class NoisyLinear(nnx.Module):
    """A linear layer with factorised Gaussian noise on its parameters, `[batch, ..., inputs]` to `[batch, ..., units]`.

    Source: Fortunato et al. 2018, arXiv 1706.10295, section 3, equations 10 and 11, and section 3.2(b).
    """

    def __init__(self, num_inputs: int, num_units: int, std: float, rngs: nnx.Rngs) -> None:
        bound = 1 / math.sqrt(num_inputs)
        uniform = nnx.initializers.uniform(2 * bound)
        self.kernel = nnx.Param(uniform(rngs.params(), (num_inputs, num_units)) - bound)
        self.bias = nnx.Param(uniform(rngs.params(), (num_units,)) - bound)
        # Without their type they would be weakly typed, and a learner step, which isn't, would be compiled twice.
        self.kernel_std = nnx.Param(jnp.full((num_inputs, num_units), std * bound, jnp.float32))
        self.bias_std = nnx.Param(jnp.full((num_units,), std * bound, jnp.float32))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        kernel, bias = self.kernel[...], self.bias[...]
        if key is None:
            return x @ kernel + bias
        num_inputs, num_units = kernel.shape
        if key.ndim == 0:
            noise = _noise(key, num_inputs + num_units)
            of_inputs, of_units = noise[:num_inputs], noise[num_inputs:]
            kernel += self.kernel_std[...] * of_inputs[:, None] * of_units
            return x @ kernel + bias + self.bias_std[...] * of_units
        # Each sample has noise of its own. Its kernel is never built, because the noise is a product.
        noise = jax.vmap(_noise, (0, None))(key, num_inputs + num_units)
        noise = noise.reshape(len(noise), *(1,) * (x.ndim - 2), -1)
        of_inputs, of_units = noise[..., :num_inputs], noise[..., num_inputs:]
        spread = (x * of_inputs) @ self.kernel_std[...] + self.bias_std[...]
        return x @ kernel + bias + spread * of_units


def _noise(key: jax.Array, size: int) -> jax.Array:
    x = jax.random.normal(key, (size,))
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x))


def linear(layer: nnx.Module, x: jax.Array, forward: ForwardPass) -> jax.Array:
    """Returns the output of a linear layer, which draws its noise if it is a noisy one."""
    return layer(x, forward.noise_key()) if isinstance(layer, NoisyLinear) else layer(x)


Activation = Callable[[jax.Array], jax.Array]


def activation_of(config: AgentConfig) -> Activation:
    """Returns the activation of hidden layers: GELU with torso hadamax (Kooi et al. 2025), otherwise ReLU."""
    return jax.nn.gelu if config.torso == "hadamax" else jax.nn.relu


class Hidden(nnx.Module):
    """A linear layer (dense, noisy or convolutional), layer normalisation if `layer_norm` is set, an activation."""

    def __init__(
        self, linear: nnx.Module, num_features: int, layer_norm: bool, activation: Activation = jax.nn.relu
    ) -> None:
        self.linear = linear
        self.norm = LayerNorm(num_features) if layer_norm else None
        self.activation = activation

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        x = linear(self.linear, x, forward)
        x = self.activation(x if self.norm is None else self.norm(x))
        forward.show(x)
        return x


class Convolution(nnx.Module):
    """A convolution with a square kernel and a bias, `[batch, height, width, channels]` to as many features.

    If `in_blocks` is set, it takes images whose blocks, with sides as long as its stride, have become channels. Its
    parameters are the same. If `spectral_norm` is set, the kernel is divided by its spectral norm.
    """

    def __init__(
        self,
        channels: int,
        num_features: int,
        kernel_size: int,
        config: AgentConfig,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        padding: Padding = "valid",
        kernel_init: nnx.Initializer = _HE,
        in_blocks: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        shape = (kernel_size, kernel_size, channels, num_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.stride, self.padding, self.lowering = stride, padding, config.convolution
        self.in_blocks, self.spectral_norm = in_blocks, spectral_norm

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, stride = self.kernel[...], self.stride
        if self.spectral_norm:
            kernel = kernel / jnp.maximum(spectral_norm(kernel), 1e-12)
        if self.in_blocks:
            kernel, stride = kernel_of_blocks(kernel, stride), 1
        return convolve(x, kernel, (stride, stride), self.lowering, self.bias[...], self.padding)


def spectral_norm(kernel: jax.Array) -> jax.Array:
    """Returns the greatest singular value of a kernel, taken for a matrix of its features by everything else.

    PyTorch, and so BTR, takes the product of one power iteration for each forward pass, from a vector that it keeps.
    Here nothing is kept, because a network's state is its parameters. Instead, ten squarings of the kernel's Gram
    matrix make 1,024 power iterations at once, from the unit vector that has most of the greatest singular vector. The
    result is at most 0.5 % too small with up to 256 features, and exact up to rounding if two singular values aren't as
    close as that. For a batch of images, the squarings take a small part of the time of the convolution itself.

    As in PyTorch, the gradient takes both singular vectors for constants.

    Args:
      kernel: `[..., features]`.

    Returns:
      `[]` float; 0 for a kernel of zeros.
    Source: Miyato et al. 2018, arXiv 1802.05957, section 2.1 and appendix A.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1]).T
    fixed = lax.stop_gradient(matrix)
    multiply = functools.partial(jnp.matmul, precision="highest")  # by default a GPU rounds factors to 10 bits (TF32)
    power = multiply(fixed, fixed.T)
    for _ in range(_NUM_SQUARINGS):
        power = power / jnp.maximum(jnp.trace(power), _TINY)
        power = multiply(power, power)
    left = power[:, jnp.argmax(jnp.diagonal(power))]
    left = left / jnp.maximum(jnp.linalg.norm(left), _TINY)
    right = multiply(left, fixed)
    right = right / jnp.maximum(jnp.linalg.norm(right), _TINY)
    return multiply(multiply(left, matrix), right)
