"""Settings as TOML, which people read and change, and back, exactly.

TOML has no None. Where a setting may be None, or is a mapping of options, the text "none" stands for it, as on the
command line. A text that would be taken for None there, and one that TOML can't hold, is written as JSON within the
quotation marks: '"none"' is the text none.
"""

import collections.abc
import functools
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from qfleet.config.agent import AgentConfig
from qfleet.config.errors import ConfigError
from qfleet.config.topologies import TOPOLOGIES
from qfleet.config.train import TrainConfig

_TABLES = ("agent", "topology", "mesh")
"""Settings that are settings of their own."""


def to_toml(name: str, value: Any) -> str:
    """Returns a setting's value as TOML, in one line. `from_toml` is the inverse.

    Args:
      name: name of the setting, which isn't that of a table.
      value: a plain value, as fields of configs hold them: a number, True, False, text, None, or a sequence or mapping
        of these.
    """
    return _written(value, may_be_none=name in _with_none())


def from_toml(text: str) -> dict[str, Any]:
    """Returns what a TOML document holds, with None for "none" where a setting may be None.

    Raises:
      ConfigError: if it isn't TOML. The message begins with what is wrong.
    """
    try:
        return _settings(tomllib.loads(text))
    except RecursionError as error:
        raise ConfigError("it is nested too deeply") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


@functools.cache
def _with_none() -> frozenset[str]:
    """Returns the names of settings that may be None or any text, and of mappings of options."""
    found = set()
    for kind in (TrainConfig, AgentConfig, *TOPOLOGIES.values()):
        for name, hint in typing.get_type_hints(kind).items():
            is_mapping = typing.get_origin(hint) is collections.abc.Mapping
            if is_mapping or hint is str or types.NoneType in typing.get_args(hint):
                found.add(name)
    return frozenset(found)


def _settings(table: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _settings(value)
        if name in _TABLES and isinstance(value, dict)
        else _plain(value)
        if name in _with_none()
        else value
        for name, value in table.items()
    }


def _written(value: Any, *, may_be_none: bool) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(
            json.dumps(value) if may_be_none and (_plain(value) != value or not _is_unicode(value)) else value
        )
    if isinstance(value, Mapping):
        items = ", ".join(f"{_key(name)} = {_written(item, may_be_none=True)}" for name, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_written(item, may_be_none=may_be_none) for item in value)}]"
    return repr(value)  # TOML writes whole and other numbers as Python does


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_unquoted(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return None if value.lower() == "none" else _unquoted(value)
    return value


def _unquoted(text: str) -> str:
    """Returns the text that is written as JSON within a text, or the text itself."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _key(name: str) -> str:
    if re.fullmatch("[A-Za-z0-9_-]+", name):
        return name
    return _quoted(name if _unquoted(name) == name and _is_unicode(name) else json.dumps(name))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML wants escaped, unlike JSON


def _is_unicode(text: str) -> bool:
    """Returns whether TOML can hold a text. Names of files may have half characters, which Python calls surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
