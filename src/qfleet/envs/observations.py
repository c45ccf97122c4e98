"""Conversion of Gymnasium's observations to the arrays that the replay stores.

Worker processes import this module, so it must not import JAX.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qfleet.config.errors import ConfigError
from qfleet.envs.action_masks import KEY, ActionMask, is_joined, join, join_view, without_mask
from qfleet.envs.contract import BrokenContract, has_mask, summary, to_numbers

if TYPE_CHECKING:
    import gymnasium

    from qfleet.core.types import EnvSpec

_SMALLEST_PICTURE = 36  # pixels, the side from which convolutions of the Nature network suit an image

MOST_VALUES = 1_000_000
"""Largest number of values that the parts of one observation may become."""


class ObservationPart(NamedTuple):
    """One array or number of an observation: all of it, or an entry of a Dict or a Tuple."""

    path: tuple[Any, ...]
    """Keys and indices that lead to it from the observation."""
    shape: tuple[int, ...]
    """Shape of what the environment returns."""
    dtype: np.dtype
    """Type of its encoding."""
    choices: np.ndarray | None
    """`[numbers, 2]` int64, the start and the count of each number, if it chooses among few values and becomes one-hot.
    None if the numbers are values themselves."""

    @property
    def size(self) -> int:
        """Number of values of its encoding."""
        return math.prod(self.shape) if self.choices is None else int(self.choices[:, 1].sum())

    @property
    def is_image(self) -> bool:
        """Whether it has the shape of a picture, with or without channels."""
        return self.choices is None and len(self.shape) in (2, 3) and sorted(self.shape)[-2] >= _SMALLEST_PICTURE

    @property
    def name(self) -> str:
        """Name of the part in errors."""
        return "the observation" + "".join(f"[{key!r}]" for key in self.path)

    @property
    def rule(self) -> str:
        """Description of what the environment must return."""
        if self.choices is None:
            return f"{self.dtype} of shape {self.shape}"
        limits = ", ".join(f"{start} to {start + count - 1}" for start, count in self.choices[:3].tolist())
        more = ", ..." if len(self.choices) > 3 else ""
        return f"a whole number from {limits}" if not self.shape else f"{self.shape} whole numbers from {limits}{more}"

    def encode(self, raw: Any, batch: tuple[int, ...]) -> np.ndarray:
        """Returns the encoding, `[*batch, *shape]`, or `[*batch, size]` if it is one-hot."""
        numbers = to_numbers(self.name, raw)
        if numbers.shape != (*batch, *self.shape):
            raise BrokenContract(f"{self.name} must have shape {(*batch, *self.shape)}, got {numbers.shape}")
        return _fit(numbers, self.dtype, self.name) if self.choices is None else self._one_hot(numbers, batch)

    def _one_hot(self, numbers: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
        assert self.choices is not None
        start, count = self.choices.T
        columns = numbers.reshape(*batch, len(count))
        is_valid = (columns >= start) & (columns < start + count)
        if columns.dtype.kind == "f":
            is_valid &= columns == np.floor(columns)
        if not is_valid.all():
            raise BrokenContract(f"{self.name} must be {self.rule}, got {columns[~is_valid].flat[0]}")
        first_of_each = np.cumsum(count) - count - start
        encoded = np.zeros((*batch, self.size), bool)
        np.put_along_axis(encoded, first_of_each + columns.astype(np.int64), True, -1)
        return encoded


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Converts raw observations to new arrays of one shape and dtype, and refuses those that don't fit."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[ObservationPart, ...]
    """What the observation consists of, in the order in which it is joined."""
    structure: Any = None
    """The keys of Dicts and the lengths of Tuples, nested as they are in the space. None for one part."""
    pixel_limit: float | None = None
    """Largest value of a pixel if the observation is an image whose space says so. `EnvSpec.pixel_limit`."""
    mask: ActionMask | None = None
    """How action masks are read, if the environment has them."""

    @property
    def lane_shape(self) -> tuple[int, ...]:
        """Shape of what `lane` returns."""
        return self.shape if self.mask is None else (math.prod(self.shape) + self.mask.actions.num_actions,)

    def lane(self, raw: Any, info: Any, terminated: bool = False) -> np.ndarray:
        """Returns what a lane returns, `[*lane_shape]`: the observation, joined with its mask if there are masks.

        Args:
          raw: what the environment returned.
          info: what it returned beside that.
          terminated: whether the episode ended in this state.

        Raises:
          BrokenContract: if the observation or the mask isn't as it must be.
        """
        if self.mask is None:
            _check_has_no_mask(info)
            return self(raw)
        raw, mask = self.mask.take(raw, info)
        return join(self(raw), self.mask.one(mask, terminated))

    def lanes(self, raw: Any, info: Any, terminated: np.ndarray) -> np.ndarray:
        """Returns what `lane` does for a batch, as Gymnasium's vector environments return it: `[lanes, *lane_shape]`.

        Args and Raises: as for `lane`; `terminated` is `[lanes]`.
        """
        num_lanes = len(terminated)
        if self.mask is None:
            _check_has_no_mask(info)
            return self(raw, num_lanes)
        raw, mask = self.mask.take(raw, info)
        is_there = None if self.mask.is_in_observation else info.get("_action_mask")
        return join(self(raw, num_lanes), self.mask.batch(mask, num_lanes, terminated, is_there))

    def __call__(self, raw: Any, num_lanes: int | None = None) -> np.ndarray:
        """Returns one observation `[*shape]`, or `[num_lanes, *shape]` from a batch, in an array of its own.

        A batch of a Dict or Tuple space is a dict or tuple of batches, as Gymnasium's vector environments return it.

        Raises:
          BrokenContract: if the observation isn't one of the space, isn't finite, or can't be stored unchanged. Floats
            are rounded to float32.
        """
        batch = () if num_lanes is None else (num_lanes,)
        if self.structure is None:
            return self.parts[0].encode(raw, batch).reshape(*batch, *self.shape)
        leaves = _leaves(self.structure, raw, "the observation")
        encoded = [
            part.encode(leaf, batch).reshape(*batch, part.size) for part, leaf in zip(self.parts, leaves, strict=True)
        ]
        joined = np.concatenate(encoded, -1, dtype=self.dtype)
        return joined.reshape(*batch, *self.shape)

    def any_batch(self, observation: Any) -> tuple[np.ndarray, bool]:
        """Returns observations `[batch, *shape]`, and whether there was a batch rather than one observation.

        It takes raw observations of the environment, and arrays that are encoded already.

        Raises:
          BrokenContract: if it is neither one observation nor a batch of them.
        """
        if self._is_encoded(observation):
            array = np.asarray(observation)
            is_batch = array.ndim > len(self.shape)
            return _fit(array if is_batch else array[None], self.dtype, "the observation"), is_batch
        leaves = [observation]
        if self.structure is not None:
            leaves = list(_leaves(self.structure, observation, "the observation"))
        first = to_numbers(self.parts[0].name, leaves[0])
        if first.ndim == len(self.parts[0].shape) + 1:
            if isinstance(self.structure, tuple) and isinstance(observation, list):  # rather than one of observations
                raise BrokenContract(f"a batch must be a tuple of {len(self.structure)} batches, got a list")
            return self(observation, len(first)), True
        return self(observation)[None], False

    def any_joined_batch(self, observation: Any, mask: Any, spec: "EnvSpec") -> tuple[np.ndarray, bool]:
        """Returns what `any_batch` does, joined with masks if the environment has them.

        Args:
          observation: as for `any_batch`; or joined with masks already, as lanes return it.
          mask: one mask, or one for each observation; None if the observation contains it.
          spec: of the environment.

        Raises:
          BrokenContract: as for `any_batch`; also if a mask is missing, isn't one or has no valid action.
        """
        if self.mask is None:
            if mask is not None:
                raise BrokenContract("`mask` must be left out, because the environment has no action masks, got one")
            return self.any_batch(observation)
        if mask is None and is_joined(observation, spec):
            is_batch = observation.ndim > len(spec.lane_shape) + (spec.frame_stack > 1)
            return np.asarray(observation if is_batch else observation[None]), is_batch
        observation, own = self.mask.take(observation, {})
        batch, is_batch = self.any_batch(observation)
        masks = self.mask.of_batch(own if mask is None else mask, len(batch) if is_batch else None)
        return join_view(batch, masks, spec), is_batch

    @property
    def messages(self) -> list[str]:
        """What the user should know about the encoding, each as what "the environment" does."""
        found = []
        for part in self.parts if len(self.parts) > 1 else ():
            name = part.name.removeprefix("the ")
            if part.is_image:
                unscaled = "" if self.dtype == np.uint8 else ", its values as they are"
                found.append(
                    f"returns an image, {name} of shape {part.shape}, beside other parts, so it is flattened for dense "
                    f"layers{unscaled}; for convolutions, let gymnasium.wrappers.TransformObservation return it alone"
                )
            if part.path[-1] == KEY:  # the one at the top is a mask, and no part
                found.append(f"returns {name}, which is an input like the others: the agent may choose any action")
        return found

    @property
    def rule(self) -> str:
        """Description of what the environment must return, in a few words."""
        if self.structure is None:
            return self.parts[0].rule
        return "; ".join(f"{part.name.removeprefix('the ')}: {part.rule}" for part in self.parts)

    def _is_encoded(self, observation: Any) -> bool:
        """Returns whether an array has the encoding's shape and is nothing that the environment could return."""
        if self.structure is None and self.parts[0].choices is None and self.parts[0].shape == self.shape:
            return False  # both are the same
        if getattr(observation, "dtype", None) != self.dtype:
            return False
        shape = np.shape(observation)
        is_number = self.structure is None and self.parts[0].choices is None and self.parts[0].shape == ()
        # Where the environment returns numbers, `[1]` is a batch of them.
        return (shape == self.shape and not is_number) or shape[1:] == self.shape


def _fit(numbers: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns numbers in a new array of another dtype.

    Raises:
      BrokenContract: if one isn't finite, or differs afterwards by more than float32's precision.
    """
    with np.errstate(all="ignore"):
        stored = np.array(numbers, dtype)
    if dtype.kind == "f":
        is_right = np.isfinite(stored)
        rule = f"finite in {dtype}"
    elif numbers.dtype == dtype:
        return stored
    else:
        is_right = stored == numbers
        rule = f"whole numbers that {dtype} can hold" if dtype.kind in "iu" else "0 or 1"
    if not is_right.all():
        raise BrokenContract(f"{name} must be {rule}, got {numbers[~is_right].flat[0]}")
    return stored


def _check_has_no_mask(info: Any) -> None:
    if has_mask(info):
        raise BrokenContract(
            "info['action_mask'] must be there from the first reset on if the environment has masks, got one later"
        )


def _leaves(structure: Any, raw: Any, name: str) -> Iterator[Any]:
    """Yields the parts of a nested observation, in the order of the space."""
    if structure is None:
        yield raw
    elif isinstance(structure, dict):
        if not isinstance(raw, Mapping) or set(raw) != set(structure):
            raise BrokenContract(f"{name} must be a dict with keys {list(structure)}, got {summary(raw)}")
        for key, inner in structure.items():
            yield from _leaves(inner, raw[key], f"{name}[{key!r}]")
    else:
        if not isinstance(raw, tuple | list) or len(raw) != len(structure):
            raise BrokenContract(f"{name} must be a tuple of {len(structure)}, got {summary(raw)}")
        for i, inner in enumerate(structure):
            yield from _leaves(inner, raw[i], f"{name}[{i}]")


def first_not_finite(batch: np.ndarray) -> int:
    """Returns the first index along the leading axis at which some number isn't finite."""
    return int(np.argmin(np.isfinite(batch).reshape(len(batch), -1).all(1)))


def make_encoder(space: "gymnasium.Space", name: str, mask: ActionMask | None = None) -> Encoder:
    """Returns the encoder of an observation space, and of the environment's action masks if it has them.

    It keeps a Box as it is, but converts numbers that are floats or wider than 32 bits to float32. Discrete and
    MultiDiscrete observations become one-hot bool, MultiBinary ones bool. The parts of a Dict or Tuple are flattened
    and joined in the order of `gymnasium.spaces.utils.flatten`: a Dict's by its sorted keys, a Tuple's as they are.
    They become bool if all of them are, keep their dtype if they share one, and become float32 otherwise. A Dict or
    Tuple of one part counts as that part, so that its image stays an image.

    Raises:
      ConfigError: if the space is another one, or is empty or too large.
    """
    from gymnasium import spaces  # only here, because environments in JAX do without Gymnasium

    space = without_mask(space, mask)
    parts = tuple(_parts(space, (), name))
    size = sum(part.size for part in parts)
    if not 1 <= size <= MOST_VALUES:
        raise ConfigError(
            f"environment {name}: an observation must have 1 to {MOST_VALUES} values, got {size} from {space}"
        )
    structure = _structure(space)
    while isinstance(space, spaces.Dict | spaces.Tuple) and len(space) == 1:
        (space,) = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
    if isinstance(space, spaces.Dict | spaces.Tuple):
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        return Encoder((size,), dtype, parts, structure, mask=mask)
    (part,) = parts
    shape = part.shape if isinstance(space, spaces.Box) and part.shape else (size,)
    return Encoder(shape, part.dtype, parts, structure, pixel_limit=_pixel_limit(space), mask=mask)


def encoder_of_arrays(shape: tuple[int, ...], dtype: np.dtype, mask: ActionMask | None = None) -> Encoder:
    """Returns the encoder of observations that already are arrays of this shape and dtype."""
    return Encoder(shape, dtype, (ObservationPart((), shape, dtype, None),), mask=mask)


def _parts(space: "gymnasium.Space", path: tuple[Any, ...], name: str) -> Iterator[ObservationPart]:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for key, inner in space.spaces.items():
            yield from _parts(inner, (*path, key), name)
    elif isinstance(space, spaces.Tuple):
        for i, inner in enumerate(space.spaces):
            yield from _parts(inner, (*path, i), name)
    elif isinstance(space, spaces.Discrete):
        yield ObservationPart(path, (), np.dtype(bool), np.array([[space.start, space.n]], np.int64))
    elif isinstance(space, spaces.MultiDiscrete):
        choices = np.stack([space.start.flatten(), space.nvec.flatten()], -1).astype(np.int64)
        yield ObservationPart(path, space.shape, np.dtype(bool), choices)
    elif isinstance(space, spaces.MultiBinary):
        yield ObservationPart(path, tuple(space.shape), np.dtype(bool), None)
    elif isinstance(space, spaces.Box):
        dtype = np.dtype(space.dtype)
        # Networks compute in float32. Narrower dtypes are kept because they save memory in the replay.
        is_kept = dtype.kind in "biu" and dtype.itemsize <= 4
        yield ObservationPart(path, space.shape, dtype if is_kept else np.dtype(np.float32), None)
    else:
        rule = "a Box, Discrete, MultiDiscrete or MultiBinary, or a Dict or Tuple of these"
        remedy = "wrap it in gymnasium.wrappers.TransformObservation, whose function returns one of these"
        raise ConfigError(f"environment {name}: observations must be {rule}, got {space}; {remedy}")


def _structure(space: "gymnasium.Space") -> Any:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {key: _structure(inner) for key, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(map(_structure, space.spaces))
    return None


def _pixel_limit(space: "gymnasium.Space") -> float | None:
    """Returns the largest value of a pixel if the bounds of a Box of 2 or 3 axes are those of an image.

    These are 0 and 1, 255 or 65,535, which is the largest number of 16 bits, as of a depth camera.
    A table of two axes with values up to 1 may be anything, so it must be as large as images are.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3) or space.dtype in (np.uint8, np.bool_):
        return None
    high = float(space.high.flat[0])
    is_bounded = high in (1.0, 255.0, 65_535.0) and bool((space.low == 0).all() and (space.high == high).all())
    is_large = len(space.shape) == 3 or high > 1 or min(space.shape) >= _SMALLEST_PICTURE
    return high if is_bounded and is_large else None
