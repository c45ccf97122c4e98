"""How the text of a flag becomes a value: whole numbers as 1000 or 1e3, and options as what they look like."""

import collections.abc
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from qfleet.config import ConfigError
from qfleet.config.option_text import read_option

FLAG_TYPES = ConstructorRegistry()
"""Rules for `tyro.cli(..., registry=FLAG_TYPES)`."""

LOG = Annotated[tuple[Literal["mlflow", "wandb"], ...], tyro.conf.UseAppendAction]
"""Type of the flag `--log`, which may be given several times."""

LOG_HELP = (
    "Tracker to log the run's metrics to, beside its folder and TensorBoard; several if it is given several times. "
    "Each needs the extra of its name."
)


def read_flags(kinds: Mapping[str, Any], arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """Returns the flags that a command line gives, by name. A flag that isn't given is absent.

    Args:
      kinds: types of all flags, by name.
      arguments: arguments of the command.
      prog: name of the command in errors.

    Raises:
      ConfigError: if a flag of several values is given twice, because only the last ones would count.
      SystemExit: if a flag is unknown, its value can't be read, or a required one is missing.
    """
    for name, kind in kinds.items():
        if typing.get_origin(kind) in (tuple, collections.abc.Mapping):
            check_given_once(f"--{name.replace('_', '-')}", arguments)
    make: Any = typing.TypedDict
    return dict(tyro.cli(make("Flags", dict(kinds), total=False), prog=prog, args=list(arguments), registry=FLAG_TYPES))


def check_given_once(flag: str, arguments: Sequence[str]) -> None:
    """Raises ConfigError if a flag of several values is given twice."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    if flags.count(flag) > 1:
        raise ConfigError(f"{flag} must be given once, with all of its values, got it {flags.count(flag)} times")


@FLAG_TYPES.primitive_rule
def _whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda texts: _to_int(texts[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


@FLAG_TYPES.primitive_rule
def _number_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = set(typing.get_args(info.type))
    if kinds not in ({int, types.NoneType}, {float, types.NoneType}):
        return None
    read, metavar = (_to_int, "INT") if int in kinds else (float, "FLOAT")
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{metavar}|none",
        instance_from_str=lambda texts: None if texts[0].lower() == "none" else read(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


@FLAG_TYPES.primitive_rule
def _option(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not Any:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE",
        instance_from_str=lambda texts: read_option(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


@FLAG_TYPES.primitive_rule
def _mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    if info.type_origin is not collections.abc.Mapping:
        return None
    kind = typing.get_args(info.type)[1]
    read = read_option if kind is Any else kind
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME VALUE ...]",
        instance_from_str=lambda texts: _to_dict(texts, read),
        is_instance=lambda value: isinstance(value, collections.abc.Mapping),
        str_from_instance=lambda value: [str(item) for pair in value.items() for item in pair],
    )


def _to_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number) or number != math.floor(number):
        raise ValueError(f"it must be a whole number, got {text[:50]}")
    return int(number)


def _to_dict(texts: list[str], read: Callable[[str], Any]) -> dict[str, Any]:
    names = texts[::2]
    if len(texts) % 2 or len(set(names)) < len(names):
        raise ValueError(f"it must be pairs of a NAME and a VALUE, each name once, got {' '.join(texts)[:200]}")
    return {name: read(text) for name, text in zip(names, texts[1::2], strict=True)}
