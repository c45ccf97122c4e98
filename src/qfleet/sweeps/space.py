"""The settings that a sweep varies: ranges and lists, read from text and checked before anything starts."""

import dataclasses
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qfleet.config import AgentConfig, ConfigError, TrainConfig, suggest
from qfleet.config.new_run import check_new_run
from qfleet.config.option_text import read_option
from qfleet.config.topologies import check_suits, field_names
from qfleet.config.values import show
from qfleet.presets.making import check_lane_options

MAX_CORNERS = 1_000
"""Most combinations of ends of ranges and entries of lists that are checked before a sweep starts."""

OF_RUNS = ("env_steps",)
"""Fields of `TrainConfig` that a sweep may vary. The others don't change what is learned, or what it is measured by."""

_YES_NO = {"yes": True, "no": False, "on": True, "off": False, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    name: str
    low: float
    high: float
    is_log: bool
    """Whether a number is as likely to be found in any one factor of ten as in another."""
    is_whole: bool

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values to check: both ends."""
        return (self.low, self.high)

    def value_of(self, chosen: Any) -> Any:
        """Returns the setting's value for what the study has chosen."""
        return chosen


@dataclasses.dataclass(frozen=True)
class Choices:
    """A list of values, of which each has a text. The study chooses among the texts."""

    name: str
    values: Mapping[str, Any]
    """The values by their texts, in the order of the list."""

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values to check: all."""
        return tuple(self.values.values())

    def value_of(self, chosen: str) -> Any:
        """Returns the setting's value for the text that the study has chosen."""
        return self.values[chosen]


Parameter = Range | Choices


def texts_of(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns how each setting varies as text, as on the command line: "1e-4..1e-2:log" or "1,3,5".

    Args:
      params: by the name of a setting, such a text, or a list of values.

    Raises:
      ConfigError: if it is something else.
    """
    if not isinstance(params, Mapping) or not params:
        raise ConfigError(
            f"a sweep must vary at least one setting, got {show(params)}; give it a range or a list, such as "
            f"learning_rate=1e-4..1e-2:log"
        )
    return {str(name): _text_of(str(name), given) for name, given in params.items()}


def _text_of(name: str, given: Any) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list | tuple):
        raise ConfigError(
            f"{name} must be a range or a list to be varied, got {show(given)}; write '1e-4..1e-2:log' or [1, 3, 5]"
        )
    try:
        return ",".join(value if isinstance(value, str) else json.dumps(value) for value in given)
    except TypeError as error:
        raise ConfigError(f"the values of {name} must be numbers, words or lists, got {show(given)}") from error


def read_space(config: TrainConfig, texts: Mapping[str, str]) -> list[Parameter]:
    """Returns the settings that vary, after checking every list entry and both ends of every range.

    Args:
      config: what the settings are that don't vary.
      texts: as `texts_of` returns them.

    Raises:
      ConfigError: if a setting can't be varied, a range or list can't be read, or a run refuses a value.
    """
    space = [_read(config, name, text.strip()) for name, text in texts.items()]
    for values in _corners(space):
        with_settings(config, values)
    return space


def _corners(space: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Yields all combinations of values to check, or each value with the first ones of the others if they are many."""
    names, lists = [each.name for each in space], [each.extremes for each in space]
    if math.prod(map(len, lists)) <= MAX_CORNERS:
        yield from (dict(zip(names, values, strict=True)) for values in itertools.product(*lists))
        return
    first = {name: values[0] for name, values in zip(names, lists, strict=True)}
    for name, values in zip(names, lists, strict=True):
        yield from ({**first, name: value} for value in values)


def with_settings(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Returns a config with other values of some settings, as a new run may have it.

    Raises:
      ConfigError: if it can't.
    """
    agent, topology = field_names(AgentConfig), field_names(type(config.topology))
    changed = dataclasses.replace(
        config,
        agent=dataclasses.replace(config.agent, **{name: values[name] for name in values if name in agent}),
        topology=dataclasses.replace(config.topology, **{name: values[name] for name in values if name in topology}),
        **{name: values[name] for name in values if name in OF_RUNS},
    )
    check_new_run(changed)
    check_lane_options(changed)
    return changed


def combinations(space: Sequence[Parameter]) -> list[dict[str, str]] | None:
    """Returns all combinations of texts if every setting is varied over a list, up to `MAX_CORNERS`; otherwise None."""
    lists = [list(each.values) for each in space if isinstance(each, Choices)]
    if len(lists) < len(space) or math.prod(map(len, lists)) > MAX_CORNERS:
        return None
    return [dict(zip((each.name for each in space), texts, strict=True)) for texts in itertools.product(*lists)]


def _read(config: TrainConfig, name: str, text: str) -> Parameter:
    kinds = _kinds_of(config, name)
    if ".." in text:
        return _read_range(name, text, kinds)
    entries = [entry.strip() for entry in re.split(r",(?![^\[]*\])", text)]
    if len(entries) < 2 or not all(entries):
        raise ConfigError(
            f"{name} must vary over a range such as 1e-4..1e-2:log, or a list such as 1,3,5, got {show(text)}; "
            f"to give it one value, leave it out of the sweep and give --{name.replace('_', '-')}"
        )
    values = {entry: _value(entry, kinds) for entry in entries}
    if len(values) < len(entries) or any(a == b for a, b in itertools.combinations(values.values(), 2)):
        raise ConfigError(f"the entries of {name} must differ from each other, got {show(text)}; give each once")
    return Choices(name, values)


def _kinds_of(config: TrainConfig, name: str) -> tuple[Any, ...]:
    """Returns the types that a setting may have.

    Raises:
      ConfigError: if there is no such setting, or a sweep can't vary it.
    """
    homes = (AgentConfig, type(config.topology), TrainConfig)
    hints = {key: kind for home in reversed(homes) for key, kind in typing.get_type_hints(home).items()}
    of_runs = field_names(TrainConfig) - set(OF_RUNS)
    known = field_names(AgentConfig) | field_names(type(config.topology)) | set(OF_RUNS)
    if name in of_runs or name == "mesh":
        raise ConfigError(
            f"a sweep varies settings of the agent or the topology, or env_steps, got {name}, which is the same in all "
            f"trials; give {'ENV' if name == 'env' else '--' + name.replace('_', '-')} for all of them"
        )
    check_suits(name, config.topology.name)
    if name not in known:
        raise ConfigError(
            f"a sweep varies settings of the agent or of topology {config.topology.name}, got {name!r}."
            f"{suggest(name.replace('-', '_'), known)}"
        )
    hint = hints[name]
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _read_range(name: str, text: str, kinds: tuple[Any, ...]) -> Range:
    rule = f"a range of {name} must be LOW..HIGH or LOW..HIGH:log, with LOW below HIGH"
    ends, _, scale = text.partition(":")
    is_whole, is_log = int in kinds, scale == "log"
    if not is_whole and float not in kinds:
        raise ConfigError(f"{name} isn't a number, so it can't have a range, got {show(text)}; give a list")
    try:
        low, high = map(float, re.split(r"(?<=[^.])\.\.", ends, maxsplit=1))
        if not low < high or not math.isfinite(low) or not math.isfinite(high) or scale not in ("", "log"):
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"{rule}, got {show(text)}; write for example 1e-4..1e-2:log") from error
    if is_log and low <= 0:
        raise ConfigError(f"a range of {name} with :log must begin above 0, got {show(text)}; leave :log out")
    if is_whole and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{name} must be a whole number, got the range {show(text)}; give whole numbers for its ends")
    return Range(name, int(low) if is_whole else low, int(high) if is_whole else high, is_log, is_whole)


def _value(text: str, kinds: tuple[Any, ...]) -> Any:
    """Returns the value that an entry of a list stands for. The config's constructor checks its type."""
    if bool in kinds and text.lower() in _YES_NO:
        return _YES_NO[text.lower()]
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if str in kinds or any(typing.get_origin(kind) is typing.Literal for kind in kinds):
        return text
    return read_option(text)
