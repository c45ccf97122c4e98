"""Torsos, which map observations to features by casting, convolutions and flattening."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.keys import Draws
from qfleet.core.types import EnvSpec, identity
from qfleet.networks.convolution import Lowering, convolve, kernel_of_blocks, to_blocks

TorsoName = Literal["mlp", "minatar", "nature"]


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


class ConvolutionSize(NamedTuple):
    """A square kernel, in pixels."""

    kernel_size: int
    stride: int
    num_features: int


TORSOS: dict[TorsoName, tuple[ConvolutionSize, ...]] = {
    "mlp": (),
    "minatar": (ConvolutionSize(3, 1, 16),),  # Young and Tian 2019, arXiv 1903.03176
    "nature": (  # Mnih et al. 2015, where one dense layer of 512 follows
        ConvolutionSize(8, 4, 32),
        ConvolutionSize(4, 2, 64),
        ConvolutionSize(3, 1, 64),
    ),
}


def choose_torso(spec: EnvSpec, torso: Literal["auto", "mlp", "minatar", "nature"]) -> TorsoName:
    """Returns the torso that `torso` means for these observations.

    `auto` decides by their shape before stacking. Observations with three axes, or with two axes of pixels (uint8, or
    with a `pixel_limit`), are images. Images of at least 36 pixels in height and width, the least that its convolutions
    take, get `nature`. Images of at least 5 pixels get `minatar`, and everything else gets `mlp`. A torso has
    convolutions only: the dense layers that follow it are `AgentConfig.hidden_sizes`, whatever the torso.

    Raises:
      ConfigError: if the torso needs images, or larger ones, or `auto` meets what may be stacked images.
    """
    shape = spec.observation_shape
    image = image_shape(spec)
    if torso == "auto":
        if len(shape) > 3 and sorted(shape)[-2] >= _smallest_image(TORSOS["nature"]):
            raise ConfigError(
                f"images must have 2 or 3 axes, got observations of shape {shape} from {spec.name}; join the frames of "
                f"a stack with their channels, as [height, width, frames x channels], or give --torso mlp to flatten "
                f"them"
            )
        size = min(image[:2]) if image else 0
        is_picture = len(shape) == 3 or spec.observation_dtype == np.uint8 or spec.pixel_limit is not None
        return "mlp" if size < 5 or not is_picture else "minatar" if size < 36 else "nature"
    smallest = _smallest_image(TORSOS[torso])
    if TORSOS[torso] and (image is None or min(image[:2]) < smallest):
        seen = f"height, width and channels {image}" if image else f"shape {spec.agent_observation_shape}"
        raise ConfigError(
            f"torso {torso} needs images at least {smallest} pixels high and wide, got observations of {seen} from "
            f"{spec.name}; give --torso auto, or let the environment return larger images"
        )
    return torso


def has_channels_first(spec: EnvSpec) -> bool:
    """Returns whether an observation is `[channels, height, width]` rather than `[height, width, channels]`.

    It is if its first axis is the shortest of three, and the other two are as similar as the sides of a picture.
    """
    if len(spec.observation_shape) != 3:
        return False
    channels, height, width = spec.observation_shape
    return channels < min(height, width) and max(height, width) <= 4 * min(height, width)


def image_shape(spec: EnvSpec) -> tuple[int, int, int] | None:
    """Returns height, width and channels of the agent's view, or None if it is no image. Frames count as channels."""
    if len(spec.observation_shape) not in (2, 3):
        return None
    height, width, *channels = spec.observation_shape
    if has_channels_first(spec):
        height, width, channels = width, channels[0], [height]
    return height, width, math.prod(channels) * spec.frame_stack


def earlier_reading(spec: EnvSpec, torso: Literal["auto", "mlp", "minatar", "nature"]) -> str:
    """Returns how runs before schema version 3 read these observations, if that differs from how they are read now.

    Until then, the first two axes of an image were its height and width whatever their lengths, and there was no
    `pixel_limit`. It returns '' for all other observations, which are read as before.
    """
    has_convolutions = choose_torso(spec, torso) != "mlp"
    if has_channels_first(spec) and has_convolutions:
        return "took their first axis for the height, and networks now take it for the channels"
    if spec.pixel_limit is None or spec.observation_dtype == np.uint8:
        return ""
    if spec.pixel_limit != 1:
        return f"left their values as they are, and networks now divide them by {spec.pixel_limit:g}"
    is_newly_image = torso == "auto" and len(spec.observation_shape) == 2 and has_convolutions
    return "flattened them, and networks now take them for images" if is_newly_image else ""


def _smallest_image(sizes: tuple[ConvolutionSize, ...]) -> int:
    """Returns the side, in pixels, of the smallest image of which these convolutions leave one pixel."""
    pixels = 1
    for size in reversed(sizes):
        pixels = (pixels - 1) * size.stride + size.kernel_size
    return pixels


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
        self.kernel_std = nnx.Param(jnp.full((num_inputs, num_units), std * bound))
        self.bias_std = nnx.Param(jnp.full((num_units,), std * bound))

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


class Hidden(nnx.Module):
    """A linear layer (dense, noisy or convolutional), then layer normalisation if `layer_norm` is set, then ReLU."""

    def __init__(self, linear: nnx.Module, num_features: int, layer_norm: bool) -> None:
        self.linear = linear
        self.norm = LayerNorm(num_features) if layer_norm else None

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        x = linear(self.linear, x, forward)
        x = jax.nn.relu(x if self.norm is None else self.norm(x))
        forward.show(x)
        return x


class Convolution(nnx.Module):
    """A convolution with bias and He initialisation, without padding.

    If `in_blocks` is set, it takes images whose blocks, with sides as long as its stride, have become channels. Its
    parameters are the same.
    """

    def __init__(
        self, channels: int, size: ConvolutionSize, lowering: Lowering, in_blocks: bool, rngs: nnx.Rngs
    ) -> None:
        shape = (size.kernel_size, size.kernel_size, channels, size.num_features)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(size.num_features))
        self.stride = size.stride
        self.in_blocks = in_blocks
        self.lowering = lowering

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, stride = self.kernel[...], self.stride
        if self.in_blocks:
            kernel, stride = kernel_of_blocks(kernel, stride), 1
        return convolve(x, kernel, (stride, stride), self.lowering, self.bias[...])


def block_size(spec: EnvSpec, config: AgentConfig) -> int:
    """Returns the side, in pixels, of the blocks stored as channels: the first layer's stride, or 1 for no blocks."""
    sizes, image = TORSOS[choose_torso(spec, config.torso)], image_shape(spec)
    if not sizes or image is None:
        return 1
    kernel_size, stride, _ = sizes[0]
    return 1 if any(side % stride for side in (kernel_size, *image[:2])) else stride


def make_storage_layout(spec: EnvSpec, config: AgentConfig) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that brings frames into the layout that the torso's first layer takes.

    Channels that come first are moved to the last axis, where convolutions take them.

    With blocks of s x s pixels, `[..., height, width(, channels)]` becomes
    `[..., s * s * channels, height / s, width / s]`. The replay stores frames in this layout, because making blocks at
    every learner step would take a fifth of the step's time with the Nature network. Channels come first because the
    fastest products on a CPU have pixels as columns.
    """
    size = block_size(spec, config)
    moves_channels = has_channels_first(spec) and choose_torso(spec, config.torso) != "mlp"

    def channels_last(obs: jax.Array) -> jax.Array:
        return jnp.moveaxis(obs, -3, -1) if moves_channels else obs

    def to_storage_layout(obs: jax.Array) -> jax.Array:
        image = channels_last(obs) if len(spec.observation_shape) == 3 else obs[..., None]
        return jnp.moveaxis(to_blocks(image, size), -1, -3)

    if size > 1:
        return to_storage_layout
    return channels_last if moves_channels else identity


class Torso(nnx.Module):
    """The convolutions that `AgentConfig.torso` names, or none.

    It maps observations to `[batch, num_features]` float32. They may come from the environment, or from the replay in
    its storage layout. Layer normalisation of a convolution is over its channels, separately at each pixel.
    """

    def __init__(self, spec: EnvSpec, config: AgentConfig, rngs: nnx.Rngs) -> None:
        sizes = TORSOS[choose_torso(spec, config.torso)]
        self.image_shape = image_shape(spec) if sizes else None
        self.num_features = math.prod(spec.agent_observation_shape)
        self.block_size = block_size(spec, config)
        self.raw_shape, self.frame_stack = spec.agent_observation_shape, spec.frame_stack
        self.pixel_limit = 255 if spec.observation_dtype == np.uint8 else spec.pixel_limit
        self.to_storage_layout = make_storage_layout(spec, config)
        self.convolutions: nnx.List[Hidden] = nnx.List([])
        if self.image_shape is None:
            return
        height, width, channels = self.image_shape
        for i, size in enumerate(sizes):
            convolution = Convolution(channels, size, config.convolution, i == 0 and self.block_size > 1, rngs)
            self.convolutions.append(Hidden(convolution, size.num_features, config.layer_norm))
            height, width = ((side - size.kernel_size) // size.stride + 1 for side in (height, width))
            channels = size.num_features
        self.num_features = height * width * channels

    def __call__(self, observations: jax.Array, forward: ForwardPass) -> jax.Array:
        if observations.shape[1:] == self.raw_shape:
            observations = stack_to_storage_layout(self.to_storage_layout, observations, self.frame_stack)
        x = observations.astype(jnp.float32)
        if self.pixel_limit is not None and self.pixel_limit != 1:
            x = x / self.pixel_limit
        if self.block_size > 1:
            x = jnp.moveaxis(x, 1, 3)  # channels of a block, before the frames of a stack
            x = x.reshape(*x.shape[:3], -1)
        elif self.image_shape is not None:
            x = x.reshape(-1, *self.image_shape)
        for convolution in self.convolutions:
            x = convolution(x, forward)
        return x.reshape(-1, self.num_features)
