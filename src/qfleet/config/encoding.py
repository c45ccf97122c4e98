"""Converts a run's config to JSON and back, and reads the JSON that earlier versions of qfleet wrote.

A change to what the JSON holds must raise `SCHEMA_VERSION` and add a migration from the version before.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from qfleet.config.errors import ConfigError
from qfleet.config.topologies import RENAMED, TOPOLOGIES
from qfleet.config.topology import TopologyConfig
from qfleet.config.train import TrainConfig

SCHEMA_VERSION = 3


def encode(config: TrainConfig) -> dict[str, Any]:
    """Returns a config as values that JSON can hold; `decode` is the inverse."""
    return {**dataclasses.asdict(config), "topology": encode_topology(config.topology)}


def encode_topology(topology: TopologyConfig) -> dict[str, Any]:
    """Returns a topology as values that JSON can hold: its name and its fields."""
    return {"name": topology.name, **dataclasses.asdict(topology)}


def decode(content: Any, schema_version: int = SCHEMA_VERSION) -> TrainConfig:
    """Returns the config that was read from JSON.

    Args:
      content: what `encode` returned, after it was written as JSON and read back.
      schema_version: version that `content` was written in; `SCHEMA_VERSION` is the newest.

    Raises:
      ConfigError: if `content` isn't a valid config, or has an unknown version.
    """
    if schema_version not in range(1, SCHEMA_VERSION + 1):
        raise ConfigError(f"schema_version must be 1 to {SCHEMA_VERSION}, got {schema_version!r}")
    for version in range(schema_version, SCHEMA_VERSION):
        content = _MIGRATIONS[version](content)
    config: TrainConfig = _decode(TrainConfig, content, "config")
    return config


def decode_topology(content: Any, name: str = "topology") -> TopologyConfig:
    """Returns the topology that was read from JSON; errors call it `name`."""
    if not isinstance(content, dict) or content.get("name") not in TOPOLOGIES:
        raise ConfigError(f"{name} must have a name, one of {', '.join(TOPOLOGIES)}, got {content!r}")
    fields = {field: value for field, value in content.items() if field != "name"}
    topology: TopologyConfig = _decode_dataclass(TOPOLOGIES[content["name"]], fields, name)
    return topology


def _migrate_from_1(content: Any) -> Any:
    """Adds the topology's name, which version 1 left to be inferred from its fields, and renames fields."""
    if not isinstance(content, dict) or not isinstance(content.get("topology"), dict):
        return content  # decoding refuses it
    old = content["topology"]
    name = _topology_of(old)
    renamed = {} if name == "parameter-server" else RENAMED
    fields = {renamed.get(field, field): value for field, value in old.items()}
    exchange = fields.pop("exchange", None)
    if exchange == "all-reduce":
        fields.pop("gossip_period_learner_steps", None)
    if exchange == "gossip":
        fields = {field: value for field, value in fields.items() if field not in ("coordinator", "process_id")}
        fields["ray_address"] = fields.get("ray_address") or "local"
    return {**content, "topology": {"name": name, **fields}}


def _topology_of(fields: Mapping[str, Any]) -> str:
    """Returns the name of the topology whose config had these fields in version 1."""
    if "exchange" in fields:
        return str(fields["exchange"])
    if "num_actors" in fields:
        return "actor-learner"
    if "num_server_shards" in fields:
        return "parameter-server"
    return "overlapped" if "lock_step" in fields else "fused"


def _migrate_from_2(content: Any) -> Any:
    """Changes nothing: since version 3 a run has an id, which is beside the config."""
    return content


_MIGRATIONS: dict[int, Callable[[Any], Any]] = {1: _migrate_from_1, 2: _migrate_from_2}
"""Functions that convert content to the next version, by the version that they convert from."""


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Returns `value`, which was read from JSON, as a `kind`; the inverse of `dataclasses.asdict` and JSON."""
    if kind is TopologyConfig:
        return decode_topology(value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, name)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, name)
    if origin is Literal:
        fits = value in arguments
    elif origin is tuple:  # tuple[X, ...]
        if isinstance(value, list):
            return tuple(_decode(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
        fits = False
    elif origin is Mapping:
        if isinstance(value, dict):
            return {key: _decode(arguments[1], item, f"{name}[{key}]") for key, item in value.items()}
        fits = False
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ConfigError(f"{name} must be {_describe(kind)}, got {value!r}")
    return value


def _decode_dataclass(kind: type, value: Any, name: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, got {value!r}")
    if fields != set(value):
        missing, unknown = sorted(fields - set(value)), sorted(set(value) - fields)
        raise ConfigError(f"{name} must have exactly its known fields, got missing {missing}, unknown {unknown}")
    return kind(**{field: _decode(hints[field], item, f"{name}.{field}") for field, item in value.items()})


def _decode_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    errors = []
    for kind in kinds:
        try:
            return _decode(kind, value, name)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(" or ".join(errors))


def _describe(kind: Any) -> str:
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    return str(getattr(kind, "__name__", kind))
