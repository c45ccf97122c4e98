"""Torsos, which map observations to features by casting, convolutions and flattening."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.types import EnvSpec, identity
from qfleet.networks.convolution import to_blocks
from qfleet.networks.layers import Convolution, ForwardPass, Hidden
from qfleet.networks.stages import HadamardStage, ImpalaStage, RectifiedPooling

TorsoName = Literal["mlp", "minatar", "nature", "impala", "hadamax"]
TorsoChoice = Literal["auto", "mlp", "minatar", "nature", "impala", "hadamax"]


class LayerSize(NamedTuple):
    """The size of one convolution, or of one stage of several. Kernels are square."""

    kernel_size: int
    stride: int
    """Stride of the convolution, or of the stage's max pooling."""
    num_features: int
    kind: Literal["convolution", "residual", "hadamard"] = "convolution"
    pool_size: int = 0

    def output_side(self, side: int) -> int:
        """Returns the height, or width, that is left of an image. Stages pad their images, convolutions don't."""
        return (side - self.kernel_size) // self.stride + 1 if self.kind == "convolution" else -(-side // self.stride)

    def smallest_side(self, pixels: int) -> int:
        """Returns the least height, or width, of which `pixels` are left, and in which the kernel fits."""
        if self.kind == "convolution":
            return (pixels - 1) * self.stride + self.kernel_size
        return max(self.kernel_size, (pixels - 1) * self.stride + 1)


TORSOS: dict[TorsoName, tuple[LayerSize, ...]] = {
    "mlp": (),
    "minatar": (LayerSize(3, 1, 16),),  # Young and Tian 2019, arXiv 1903.03176
    "nature": (  # Mnih et al. 2015, where one dense layer of 512 follows
        LayerSize(8, 4, 32),
        LayerSize(4, 2, 64),
        LayerSize(3, 1, 64),
    ),
    "impala": tuple(LayerSize(3, 2, channels, "residual", 3) for channels in (16, 32, 32)),
    "hadamax": (  # one dense layer of 512 follows
        LayerSize(8, 4, 32, "hadamard", 4),
        LayerSize(4, 2, 64, "hadamard", 2),
        LayerSize(3, 1, 64, "hadamard", 3),
    ),
}


def choose_torso(spec: EnvSpec, torso: TorsoChoice) -> TorsoName:
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


def earlier_reading(spec: EnvSpec, torso: TorsoChoice) -> str:
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


def _smallest_image(sizes: tuple[LayerSize, ...]) -> int:
    """Returns the side, in pixels, of the smallest image of which these layers leave one pixel."""
    pixels = 1
    for size in reversed(sizes):
        pixels = size.smallest_side(pixels)
    return pixels


def block_size(spec: EnvSpec, config: AgentConfig) -> int:
    """Returns the side, in pixels, of the blocks stored as channels: the first layer's stride, or 1 for no blocks."""
    sizes, image = TORSOS[choose_torso(spec, config.torso)], image_shape(spec)
    if not sizes or image is None:
        return 1
    first = sizes[0]
    has_blocks = first.kind == "convolution" and not any(
        side % first.stride for side in (first.kernel_size, *image[:2])
    )
    return first.stride if has_blocks else 1


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

    Raises:
      ConfigError: if the torso doesn't suit the observations.
    """

    def __init__(self, spec: EnvSpec, config: AgentConfig, rngs: nnx.Rngs) -> None:
        sizes = TORSOS[choose_torso(spec, config.torso)]
        self.image_shape = image_shape(spec) if sizes else None
        self.num_features = math.prod(spec.agent_observation_shape)
        self.block_size = block_size(spec, config)
        self.raw_shape, self.frame_stack = spec.agent_observation_shape, spec.frame_stack
        self.pixel_limit = 255 if spec.observation_dtype == np.uint8 else spec.pixel_limit
        self.to_storage_layout = make_storage_layout(spec, config)
        self.convolutions: nnx.List[Hidden | ImpalaStage | RectifiedPooling | HadamardStage] = nnx.List([])
        if self.image_shape is None:
            return
        height, width, channels = self.image_shape
        for i, size in enumerate(sizes):
            size = size._replace(num_features=size.num_features * config.torso_width)
            self.convolutions.append(_make_layer(channels, size, config, i == 0 and self.block_size > 1, rngs))
            height, width, channels = size.output_side(height), size.output_side(width), size.num_features
        if config.torso == "impala":
            pooled = config.adaptive_pooling
            if pooled is not None and pooled > min(height, width):
                raise ConfigError(
                    f"adaptive_pooling must be at most the sides of the map that torso impala leaves, got {pooled} for "
                    f"a map of {height} x {width} pixels from images of {spec.name}; try "
                    f"adaptive_pooling={min(height, width)}, or larger images"
                )
            self.convolutions.append(RectifiedPooling(pooled))
            height, width = (height, width) if pooled is None else (pooled, pooled)
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


def _make_layer(
    channels: int, size: LayerSize, config: AgentConfig, in_blocks: bool, rngs: nnx.Rngs
) -> Hidden | ImpalaStage | HadamardStage:
    if size.kind == "residual":
        return ImpalaStage(channels, size.num_features, config, rngs)
    if size.kind == "hadamard":
        pooling = (size.pool_size, size.stride)
        return HadamardStage(channels, size.num_features, size.kernel_size, pooling, config, rngs)
    convolution = Convolution(
        channels, size.num_features, size.kernel_size, config, rngs, stride=size.stride, in_blocks=in_blocks
    )
    return Hidden(convolution, size.num_features, config.layer_norm)
