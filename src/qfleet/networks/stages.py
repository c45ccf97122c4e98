"""Stages of the larger torsos: residual blocks and products of two convolutions, each with max pooling."""

import jax
import jax.numpy as jnp
from flax import nnx

from qfleet.config import AgentConfig
from qfleet.networks.layers import Convolution, ForwardPass, LayerNorm, activation_of
from qfleet.networks.pooling import adaptive_max_pool, max_pool

_LECUN, _XAVIER = nnx.initializers.lecun_normal(), nnx.initializers.xavier_normal()


class ResidualBlock(nnx.Module):
    """Adds to `[batch, height, width, features]` what two 3x3 convolutions make of it, with ReLU before each."""

    def __init__(self, num_features: int, config: AgentConfig, rngs: nnx.Rngs) -> None:
        self.convolutions = nnx.List([
            Convolution(
                num_features, num_features, 3, config, rngs,
                padding="same", kernel_init=_LECUN, spectral_norm=config.spectral_norm,
            )
            for _ in range(2)
        ])  # fmt: skip

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        change = x
        for convolution in self.convolutions:
            change = jax.nn.relu(change)
            forward.show(change)
            change = convolution(change)
        return x + change


class ImpalaStage(nnx.Module):
    """A 3x3 convolution, max pooling of 3x3 pixels with a stride of 2, and two residual blocks.

    It maps `[batch, height, width, channels]` to `[batch, ceil(height / 2), ceil(width / 2), features]`. Kernels start
    with LeCun's initialisation (variance 1 / inputs), as in the program of Espeholt et al., and biases with 0. There is
    no layer normalisation, as in both papers; `AgentConfig.layer_norm` normalises the dense layers that follow.

    If `AgentConfig.spectral_norm` is set, the kernels of the residual blocks are divided by their spectral norms, as in
    BTR. BTR's program centres each pooling window on a pixel with an even index. Here, as in the program of Espeholt et
    al., a window begins there if the image has an even number of pixels.

    Source: Espeholt et al. 2018, arXiv 1802.01561, figure 3, right; BTR: Clark et al. 2024, arXiv 2411.03820.
    """

    def __init__(self, channels: int, num_features: int, config: AgentConfig, rngs: nnx.Rngs) -> None:
        self.convolution = Convolution(channels, num_features, 3, config, rngs, padding="same", kernel_init=_LECUN)
        self.blocks = nnx.List([ResidualBlock(num_features, config, rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        x = max_pool(self.convolution(x), 3, 2)
        for block in self.blocks:
            x = block(x, forward)
        return x


class RectifiedPooling(nnx.Module):
    """ReLU, then adaptive max pooling to `pooled` x `pooled` pixels, or none if that is None."""

    def __init__(self, pooled: int | None) -> None:
        self.pooled = pooled

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        x = jax.nn.relu(x)
        forward.show(x)
        return x if self.pooled is None else adaptive_max_pool(x, self.pooled)


class HadamardStage(nnx.Module):
    """The product of two convolutions, each with normalisation and GELU of its own, then max pooling.

    It maps `[batch, height, width, channels]` to `[batch, ceil(height / stride), ceil(width / stride), features]`. Both
    convolutions are one, with twice the features. Kernels start with Xavier's initialisation (Gaussian, variance
    2 / (inputs + outputs)) and biases with 0.

    It is as the paper's program has it, except that normalisation is an option (`AgentConfig.layer_norm`), which the
    paper always has. The product is in the convolutions only, as in that program: the dense layers that follow,
    `AgentConfig.hidden_sizes`, have GELU, but one stream each.

    Source: Kooi et al. 2025, arXiv 2505.15345, section 4 and appendix B; program: github.com/Jacobkooi/Hadamax,
    purejaxql/networks.py.
    """

    def __init__(
        self,
        channels: int,
        num_features: int,
        kernel_size: int,
        pooling: tuple[int, int],
        config: AgentConfig,
        rngs: nnx.Rngs,
    ) -> None:
        self.convolution = Convolution(
            channels, 2 * num_features, kernel_size, config, rngs, padding="same", kernel_init=_two_kernels
        )
        norms = [LayerNorm(num_features), LayerNorm(num_features)] if config.layer_norm else []
        self.norms = nnx.List(norms)
        self.activation = activation_of(config)
        self.pooling = pooling

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        streams = jnp.split(self.convolution(x), 2, axis=-1)
        if self.norms:
            streams = [norm(stream) for norm, stream in zip(self.norms, streams, strict=True)]
        x = max_pool(self.activation(streams[0]) * self.activation(streams[1]), *self.pooling)
        forward.show(x)
        return x


def _two_kernels(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns two random kernels next to each other, each with half of the features."""
    half = (*shape[:-1], shape[-1] // 2)
    return jnp.concatenate([_XAVIER(key, half) for key in jax.random.split(key)], axis=-1)
