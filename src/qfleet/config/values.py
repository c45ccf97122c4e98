"""Brings what users give as settings to plain Python values, which a run's config.json can hold and give back."""

import collections.abc
import dataclasses
import functools
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from qfleet.config.errors import ConfigError, suggest
from qfleet.config.own_parts import is_own_name

MAX_FLOAT = 3.4e38
"""Largest magnitude of a setting that isn't a whole number; float32, in which runs compute, holds no larger one."""

MAX_OPTION = 2**64
"""Bound of whole numbers among the options of an environment or optimiser."""

MAX_DEPTH = 16
"""Largest number of lists and mappings within each other in an option."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of all configs. Its constructor brings each field to a plain value of the field's type, or refuses it.

    A NumPy number becomes a Python number, 1e5 becomes 100000 where a whole number is due, a path becomes text, and a
    list becomes a tuple.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _hints(kind)
        for field in dataclasses.fields(self):
            plain = to_plain(hints[field.name], getattr(self, field.name), field.name, _default_of(field))
            object.__setattr__(self, field.name, plain)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _default_of(field: dataclasses.Field[Any]) -> str:
    """Returns a remedy that holds for every value of a field."""
    if field.default is dataclasses.MISSING:
        return "; leave it out for the default" if field.default_factory is not dataclasses.MISSING else ""
    return f"; leave it out for the default, {field.default!r}"


def to_plain(kind: Any, value: Any, name: str, otherwise: str = "") -> Any:
    """Returns `value` as a plain Python value of the type `kind`.

    Args:
      kind: a type that a field of a config has. `Any` stands for every value that JSON can hold.
      value: what the user gave. NumPy and JAX scalars, paths, lists and integral floats are converted.
      name: name of the setting, for errors.
      otherwise: remedy, for errors where the value tells none.

    Raises:
      ConfigError: if the value isn't of that type, or isn't finite.
    """
    value = _without_array(value)
    alternatives = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    or_none, or_own = types.NoneType in alternatives, str in alternatives and types.NoneType not in alternatives
    if alternatives:  # the only unions are with None, and those of words with MODULE:NAME
        if value is None and or_none:
            return None
        if or_own and is_own_name(value):
            return _text(value)
        kind = next(each for each in alternatives if each is not types.NoneType)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _to_option(value, name, MAX_DEPTH)
    if origin is Literal and isinstance(value, str) and _text(value) in arguments:
        return _text(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(to_plain(arguments[0], item, f"{name}[{i}]", otherwise) for i, item in enumerate(value))
    if origin is collections.abc.Mapping and isinstance(value, Mapping):
        return {_key(key, name): to_plain(arguments[1], item, _item(name, key)) for key, item in value.items()}
    if isinstance(kind, type) and (plain := _to_scalar(kind, value, name, otherwise)) is not None:
        return plain
    rule = f"{_describe(kind)}{', or None' if or_none else ', or MODULE:NAME' if or_own else ''}"
    raise ConfigError(f"{name} must be {rule}, got {show(value)}{_remedy(kind, value) or otherwise}")


def _to_scalar(kind: type, value: Any, name: str, otherwise: str) -> Any:
    """Returns `value` as a bool, int, float, text or config, or None if it isn't a `kind`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is int and is_number:
        if isinstance(value, numbers.Integral):
            return int(value)
        return int(value) if _is_finite(value) and value == math.floor(value) else None
    if kind is float and is_number:
        return _to_float(value, name, MAX_FLOAT, otherwise)
    if kind is str and isinstance(value, str | os.PathLike):
        return _text(value)
    return value if kind not in (int, float, str) and isinstance(value, kind) else None


def _to_float(value: Any, name: str, largest: float, otherwise: str) -> float:
    if not _is_finite(value):
        raise ConfigError(f"{name} must be finite, got {show(value)}{otherwise}")
    if not abs(value) <= largest:
        raise ConfigError(f"{name} must be at most {largest:g} in magnitude, got {show(value)}{otherwise}")
    return float(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number or a fraction that is too large for a float
        return False


def _to_option(value: Any, name: str, depth: int) -> Any:
    """Returns an option of an environment or optimiser as what JSON gives back: itself, its type included."""
    value = _without_array(value)
    if depth and isinstance(value, list | tuple):
        return [_to_option(item, f"{name}[{i}]", depth - 1) for i, item in enumerate(value)]
    if depth and isinstance(value, Mapping):
        return {_key(key, name): _to_option(item, _item(name, key), depth - 1) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        if abs(int(value)) < MAX_OPTION:
            return int(value)
        raise ConfigError(f"{name} must be a whole number of at most 64 bits, got {show(value)}")
    if isinstance(value, numbers.Real):
        return _to_float(value, name, sys.float_info.max, "")
    if isinstance(value, str | os.PathLike):
        return _text(value)
    nested = isinstance(value, list | tuple | Mapping)
    rule = f"nested at most {MAX_DEPTH} deep" if nested else _describe(Any)
    raise ConfigError(f"{name} must be {rule}, got {show(value)}; give what config.json can hold")


def _item(name: str, key: Any) -> str:
    return f"{name}[{key if len(str(key)) < 50 else show(key)}]"


def _key(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"the names in {name} must be text, got {show(key)}; put it in quotation marks")
    return _text(key)


def _text(value: Any) -> str:
    """Returns plain text: not a subclass of `str`, whose members may print as something else."""
    text = value if isinstance(value, str) else os.fspath(value)
    if not isinstance(text, str):
        raise ConfigError(f"a path must be text, got {show(text)}; decode it with os.fsdecode")
    return str.__str__(text)


def _without_array(value: Any) -> Any:
    """Returns NumPy and JAX scalars as Python numbers, and their arrays as lists of numbers."""
    shape = getattr(value, "shape", None)
    if shape is None or not hasattr(value, "tolist"):
        return value
    return value.item() if shape == () else value.tolist()


def show(value: Any) -> str:
    """Returns a value for an error: short, however long the value is."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a whole number of about {int(math.log10(abs(value))) + 1} digits"
    try:
        text = repr(value)
    except Exception:  # the value may be of a class of the user's, whose repr may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:100]} ... ({len(text)} characters)"


def _describe(kind: Any) -> str:
    """Returns a type in words: "a whole number"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a tuple, each item {_describe(arguments[0])}"
    if origin is collections.abc.Mapping:
        return f"a mapping of names to {_PLURALS[arguments[1]]}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
        Any: "a number, True, False, text, None, or a list or mapping of these",
    }
    return words.get(kind) or f"of class {kind.__name__}"


_PLURALS = {Any: "values", float: "numbers", str: "text"}

_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _remedy(kind: Any, value: Any) -> str:
    """Returns what to give instead, if the value tells; otherwise an empty string."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) and value in (0, 1) else ""
    if typing.get_origin(kind) is Literal:
        near = suggest(text, typing.get_args(kind))
        return near and f".{near}"
    if kind is bool and (wanted := _FLAGS.get(text.lower())) is not None:
        return f"; give {wanted}"
    if kind in (int, float) and isinstance(value, bool):
        return f"; give {int(value)}"
    if kind in (int, float) and isinstance(value, str):
        try:
            number = to_plain(kind, float(value), "")
        except ValueError:  # of which ConfigError is one
            return ""
        return f"; give {number} without quotation marks"
    if kind is int and isinstance(value, numbers.Real) and _is_finite(value):
        return f"; give {math.floor(value)} or {math.ceil(value)}"
    if typing.get_origin(kind) is tuple and isinstance(value, numbers.Real):
        return f"; give ({show(value)},)"
    return ""
