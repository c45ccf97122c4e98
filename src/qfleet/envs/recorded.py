"""Environments that a checkpoint records: what a policy needs to act in one, without making it.

A record is plain values that JSON can hold. It names no code, and reading it imports nothing.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qfleet.config.errors import ConfigError
from qfleet.core.types import EnvSpec
from qfleet.envs.action_masks import ActionMask
from qfleet.envs.actions import Actions, numbered
from qfleet.envs.host import HostEnv
from qfleet.envs.observations import MOST_VALUES, Encoder, ObservationPart
from qfleet.envs.spec import InGraphEnv

_DTYPES = {np.dtype(code).name: np.dtype(code) for code in "?bBhHiIlLqQefd"}

_MOST_NUMBERS = 10_000
"""Largest number of parts of an observation, and of choices in them, that a record holds."""

_MAY_CHANGE = ("name", "time_limit")
"""Entries of a record that don't matter to a policy."""


class Interface(NamedTuple):
    """What a policy needs to know of an environment to act in it."""

    spec: EnvSpec
    encoder: Encoder | None = None
    """As in `HostEnv`."""
    actions: Actions | None = None
    """As in `HostEnv`."""


class RecordedEnv:
    """An environment that is made when it is needed. Until then, the record in a checkpoint stands for it."""

    def __init__(self, name: str, record: dict[str, Any], make: Callable[[], InGraphEnv | HostEnv]) -> None:
        """Takes a record for which `is_record` holds, the environment's name in the run's config, and its maker."""
        self.interface = _interface(record)
        self._name, self._record, self._make = name, record, make

    def make(self) -> InGraphEnv | HostEnv:
        """Returns the environment itself.

        Raises:
          ConfigError: if it can't be made, or has changed since it was recorded.
        """
        env = self._make()
        check_as_recorded(env, self._record, self._name)
        return env


def interface_of(env: InGraphEnv | HostEnv) -> Interface:
    """Returns what a policy needs to know of an environment."""
    return Interface(env.spec, env.encoder, env.actions) if isinstance(env, HostEnv) else Interface(env.spec)


def record_of(env: InGraphEnv | HostEnv) -> dict[str, Any] | None:
    """Returns the record of an environment; None if it is one of the rare ones that a record can't hold."""
    record = _describe(env)
    return record if is_record(record) else None


def is_record(content: Any) -> bool:
    """Returns whether this, which anybody may have written, is a record. If so, reading it takes little memory."""
    try:
        _interface(content)
    except (_NoRecord, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def check_as_recorded(env: InGraphEnv | HostEnv, record: dict[str, Any] | None, name: str) -> None:
    """Checks that an environment is still what was learned in, except for its time limit.

    Args:
      env: the environment as it is now.
      record: its record, if there is one.
      name: its name in the run's config.

    Raises:
      ConfigError: if it has changed. The message says what was and what is.
    """
    now = _describe(env)
    for field, before in {"action_mask": None, **record}.items() if record else ():
        if field in now and field not in _MAY_CHANGE and now[field] != before:
            label = "observations" if field == "observation_shape" else field
            raise ConfigError(
                f"the environment {name} must be as it was in training; it has {label} {_short(now[field])} now, and "
                f"had {_short(before)}; undo the change, or train anew"
            )


def _describe(env: InGraphEnv | HostEnv) -> dict[str, Any]:
    """Returns what becomes the record of an environment."""
    spec, encoder, actions = interface_of(env)
    return {
        "name": spec.name,
        "observation_shape": list(spec.observation_shape),
        "observation_dtype": spec.observation_dtype.name,
        "num_actions": spec.num_actions,
        "frame_stack": spec.frame_stack,
        "time_limit": spec.time_limit,
        "pixel_limit": spec.pixel_limit,
        "action_mask": _mask_of(spec, encoder),
        "raw_observation": None if encoder is None else _parts_of(encoder.structure, iter(encoder.parts)),
        "raw_actions": None if actions is None else _actions_of(actions),
    }


def _mask_of(spec: EnvSpec, encoder: Encoder | None) -> str | None:
    """Returns where action masks are: "info", "observation", or "lanes" if no encoder reads them. None: nowhere."""
    if not spec.has_action_mask:
        return None
    if encoder is None or encoder.mask is None:
        return "lanes"
    return "observation" if encoder.mask.is_in_observation else "info"


def _parts_of(structure: Any, parts: Iterator[ObservationPart]) -> dict[str, Any]:
    """Returns the entry for an observation, or for a part of it with parts of its own."""
    if structure is None:
        _, shape, dtype, choices = next(parts)
        return {
            "shape": list(shape),
            "dtype": dtype.name,
            "choices": None if choices is None else choices.tolist(),
        }
    if isinstance(structure, dict):
        return {"keys": list(structure), "parts": [_parts_of(inner, parts) for inner in structure.values()]}
    return {"keys": None, "parts": [_parts_of(inner, parts) for inner in structure]}


def _actions_of(actions: Actions) -> dict[str, Any]:
    table = actions.table
    if table.ndim == 1 and np.array_equal(table, numbered(len(table), int(table[0])).table):
        return {"start": int(table[0])}
    return {"dtype": table.dtype.name, "table": table.tolist()}


# --- Reading a record, which may hold anything ---


class _NoRecord(Exception):
    """Something in it isn't as a record has it."""


def _check(holds: bool) -> None:
    if not holds:
        raise _NoRecord


def _interface(record: Any) -> Interface:
    """Returns what a record holds. Raises one of the errors that `is_record` lists if it isn't a record."""
    _check(isinstance(record, dict) and isinstance(record["name"], str) and len(record["name"]) <= 1_000)
    shape, limit = _shape(record["observation_shape"], least=1), record["pixel_limit"]
    _check(limit is None or (type(limit) in (int, float) and 0 < limit < math.inf))
    _check(record["time_limit"] is None or _is_whole(record["time_limit"], 1))
    _check(_is_whole(record["num_actions"], 1, MOST_VALUES) and _is_whole(record["frame_stack"], 1, MOST_VALUES))
    place = record.get("action_mask")  # records of environments without masks didn't always have it
    _check(place in (None, "info", "observation", "lanes"))
    spec = EnvSpec(
        name=record["name"],
        observation_shape=shape,
        observation_dtype=_DTYPES[record["observation_dtype"]],
        num_actions=record["num_actions"],
        frame_stack=record["frame_stack"],
        time_limit=record["time_limit"],
        pixel_limit=limit,
        has_action_mask=place is not None,
    )
    actions = None if record["raw_actions"] is None else _actions(record["raw_actions"], spec.num_actions)
    mask = None if place in (None, "lanes") else ActionMask(actions or numbered(spec.num_actions), place != "info")
    encoder = None if record["raw_observation"] is None else _encoder(record["raw_observation"], spec, mask)
    return Interface(spec, encoder, actions)


def _encoder(content: Any, spec: EnvSpec, mask: ActionMask | None) -> Encoder:
    parts: list[ObservationPart] = []
    structure = _structure(content, (), parts)
    size = sum(part.size for part in parts)
    _check(size == math.prod(spec.observation_shape) <= MOST_VALUES)
    return Encoder(spec.observation_shape, spec.observation_dtype, tuple(parts), structure, spec.pixel_limit, mask)


def _structure(content: Any, path: tuple[Any, ...], parts: list[ObservationPart]) -> Any:
    """Returns the structure of an observation or of a part of it, and adds the parts without parts to `parts`."""
    _check(len(path) <= 32 and len(parts) <= _MOST_NUMBERS)
    if "parts" not in content:
        shape, choices = _shape(content["shape"], least=0), content["choices"]
        if choices is not None:
            _check(isinstance(choices, list) and len(choices) == math.prod(shape) <= _MOST_NUMBERS)
            for start, count in choices:
                _check(_is_whole(start, -(2**62)) and _is_whole(count, 1, MOST_VALUES))
            choices = np.array(choices, np.int64).reshape(-1, 2)
        parts.append(ObservationPart(path, shape, _DTYPES[content["dtype"]], choices))
        return None
    keys, inner = content["keys"], content["parts"]
    _check(isinstance(inner, list) and len(inner) <= _MOST_NUMBERS)
    if keys is None:
        return tuple(_structure(part, (*path, i), parts) for i, part in enumerate(inner))
    _check(isinstance(keys, list) and len(set(keys)) == len(keys) and all(type(key) in (int, str) for key in keys))
    return {key: _structure(part, (*path, key), parts) for key, part in zip(keys, inner, strict=True)}


def _actions(content: Any, num_actions: int) -> Actions:
    if "start" in content:
        _check(_is_whole(content["start"], -(2**62)))
        return numbered(num_actions, content["start"])
    table, dtype = np.array(content["table"]), _DTYPES[content["dtype"]]
    _check(table.ndim > 0 and len(table) == num_actions and table.dtype.kind in "iu" and dtype.kind in "iu")
    _check(np.array_equal(table.astype(dtype), table))
    return Actions(table.astype(dtype))


def _shape(content: Any, least: int) -> tuple[int, ...]:
    _check(isinstance(content, list) and len(content) <= 16 and all(_is_whole(size, least) for size in content))
    _check(math.prod(content) < 2**31)
    return tuple(content)


def _is_whole(value: Any, least: int, most: int = 2**62) -> bool:
    return type(value) is int and least <= value <= most


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."
