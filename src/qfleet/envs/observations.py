"""Conversion of Gymnasium's observations to the arrays that the replay stores.

Worker processes import this module, so it must not import JAX.
"""

import dataclasses
from typing import Any

import gymnasium
import numpy as np

from qfleet.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Converts raw observations to new arrays of one shape and dtype, and refuses those that don't fit."""

    shape: tuple[int, ...]
    dtype: np.dtype
    first: int | None = None
    """Smallest observation of a Discrete space, whose observations become one-hot. None for a Box."""

    def __call__(self, raw: Any, num_lanes: int | None = None) -> np.ndarray:
        """Returns one observation `[*shape]`, or `[num_lanes, *shape]` from a batch, in an array of its own.

        Raises:
          ValueError: if the shape isn't that of the space, or a number isn't finite.
        """
        if self.first is not None:
            encoded = np.asarray(raw)[..., None] - self.first == np.arange(self.shape[0])
            if not encoded.any(-1).all():
                raise ValueError(f"the observation is outside of its Discrete space, got {raw}")
        else:
            with np.errstate(over="ignore"):  # an overflow gives infinity, which the check below reports more clearly
                encoded = np.array(raw, self.dtype)
        batch = () if num_lanes is None else (num_lanes,)
        if encoded.shape != (*batch, *self.shape):
            raise ValueError(f"the observation must have shape {(*batch, *self.shape)}, got {encoded.shape}")
        if encoded.dtype.kind == "f" and not np.isfinite(encoded).all():
            where = "" if num_lanes is None else f" in lane {first_not_finite(encoded)}"
            value = encoded[~np.isfinite(encoded)][0]
            raise ValueError(f"the observation must be finite, got {value}{where}")
        return encoded


def first_not_finite(batch: np.ndarray) -> int:
    """Returns the first index along the leading axis at which some number isn't finite."""
    return int(np.argmin(np.isfinite(batch).reshape(len(batch), -1).all(1)))


def make_encoder(space: gymnasium.Space, name: str) -> Encoder:
    """Returns the encoder of an observation space.

    It keeps a Box as it is, but converts numbers that are floats or wider than 32 bits to float32. It makes Discrete
    observations one-hot bool.

    Raises:
      ConfigError: if the space is neither.
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return Encoder((int(space.n),), np.dtype(bool), int(space.start))
    if isinstance(space, gymnasium.spaces.Box) and space.shape:
        dtype = np.dtype(space.dtype)
        # Networks compute in float32. Narrower dtypes are kept because they save memory in the replay.
        is_kept = dtype.kind in "biu" and dtype.itemsize <= 4
        return Encoder(space.shape, dtype if is_kept else np.dtype(np.float32))
    remedy = "wrap it in gymnasium.wrappers.FlattenObservation and register that under an id of your own"
    raise ConfigError(f"environment {name}: observations must be a Box with axes or Discrete, got {space}; {remedy}")


def discrete_actions(space: gymnasium.Space, name: str) -> gymnasium.spaces.Discrete:
    """Returns the action space, which must be Discrete.

    Raises:
      ConfigError: if it isn't.
    """
    if not isinstance(space, gymnasium.spaces.Discrete):
        remedy = "choose an environment with discrete actions, or wrap it in gymnasium.wrappers.TransformAction"
        raise ConfigError(f"environment {name}: actions must be Discrete, got {space}; {remedy}")
    return space
