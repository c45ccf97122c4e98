"""Converts a run's config to JSON and back, and reads the JSON that earlier versions of qfleet wrote.

A change to what the JSON holds must raise `SCHEMA_VERSION` and add a migration from the version before.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qfleet.config.errors import ConfigError
from qfleet.config.topologies import RENAMED, TOPOLOGIES
from qfleet.config.topology import TopologyConfig
from qfleet.config.train import TrainConfig
from qfleet.config.values import show

SCHEMA_VERSION = 8


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
    config: TrainConfig = _decode(TrainConfig, migrated(content, schema_version), "config")
    return config


def migrated(content: Any, schema_version: int) -> Any:
    """Returns what an earlier version of qfleet wrote as the newest one writes it.

    Raises:
      ConfigError: if there is no such version.
    """
    if type(schema_version) is not int or schema_version not in range(1, SCHEMA_VERSION + 1):
        raise ConfigError(f"schema_version must be 1 to {SCHEMA_VERSION}, got {show(schema_version)}")
    for version in range(schema_version, SCHEMA_VERSION):
        content = _MIGRATIONS[version](content)
    return content


def decode_topology(content: Any, name: str = "topology") -> TopologyConfig:
    """Returns the topology that was read from JSON; errors call it `name`."""
    if not isinstance(content, dict) or str(content.get("name")) not in TOPOLOGIES:
        raise ConfigError(f"{name} must have a name, one of {', '.join(TOPOLOGIES)}, got {show(content)}")
    fields = {field: value for field, value in content.items() if field != "name"}
    topology: TopologyConfig = _decode(TOPOLOGIES[content["name"]], fields, name)
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
    """Adds how evaluations play, which was strictly greedy.

    Since version 3 a run also has an id, which is beside the config.
    """
    if not isinstance(content, dict):
        return content  # decoding refuses it
    return {"eval_exploration": 0.0, "eval_max_episode_steps": None, **content}


def _migrate_from_3(content: Any) -> Any:
    """Adds how importance weights are normalised, which they weren't."""
    if not isinstance(content, dict) or not isinstance(content.get("agent"), dict):
        return content  # decoding refuses it
    return {**content, "agent": {"importance_normalisation": "none", **content["agent"]}}


def _migrate_from_4(content: Any) -> Any:
    """Adds what a run writes beside its checkpoints and metrics, and that its best checkpoint is kept from then on."""
    new = {"report": True, "checkpoint_best": True}
    return {**new, **content} if isinstance(content, dict) else content  # decoding refuses what is no object


def _migrate_from_5(content: Any) -> Any:
    """Adds heads, Munchausen's reward, noise, memory, options of torsos, shares of a run: none of them existed."""
    if not isinstance(content, dict) or not isinstance(content.get("agent"), dict):
        return content  # decoding refuses it
    return {**content, "agent": {**_ADDED_IN_6, **content["agent"]}}


def _migrate_from_6(content: Any) -> Any:
    """Adds the labels of nodes, which no process asked for."""
    if not isinstance(content, dict) or not isinstance(content.get("topology"), dict):
        return content  # decoding refuses it
    topology = content["topology"]
    new: dict[str, Any] = {name: {} for name in _ADDED_TO_TOPOLOGIES_IN_7.get(str(topology.get("name")), ())}
    return {**content, "topology": {**new, **topology}}


def _migrate_from_7(content: Any) -> Any:
    """Adds the priorities of new transitions, which were the TD errors of the actors."""
    if not isinstance(content, dict) or not isinstance(content.get("topology"), dict):
        return content  # decoding refuses it
    topology = content["topology"]
    new = {"initial_priorities": "td_error"} if topology.get("name") == "actor-learner" else {}
    return {**content, "topology": {**new, **topology}}


_ADDED_IN_6 = {
    "head": "scalar",
    "num_atoms": 51,
    "value_min": -10.0,
    "value_max": 10.0,
    "hl_gauss_smoothing": 0.75,
    "num_quantiles": 64,
    "num_acting_quantiles": 32,
    "num_cosines": 64,
    "munchausen": False,
    "munchausen_temperature": 0.03,
    "munchausen_weight": 0.9,
    "munchausen_clip": -1.0,
    "noisy": False,
    "noisy_std": 0.5,
    "memory": "none",
    "memory_size": 128,
    "burn_in": 0,
    "sequence_length": 80,
    "sequence_period": None,
    "priority_max_share": 0.9,
    "value_rescaling": False,
    "torso_width": 1,
    "spectral_norm": False,
    "adaptive_pooling": None,
    "exploration_max_duration": 1,
    "exploration_duration_exponent": 2.0,
    "exploration_fraction": None,
    "learning_rate_fraction": None,
    "importance_exponent_fraction": None,
    "normalise_observations": False,
    "normalise_rewards": False,
    "network": None,
    "target": None,
    "own_options": {},
}
"""Fields of `AgentConfig` that version 6 added, with values that change nothing."""

_ADDED_TO_TOPOLOGIES_IN_7 = {
    "all-reduce": ("process_node_labels",),
    "gossip": ("process_node_labels",),
    "actor-learner": ("actor_node_labels", "learner_node_labels", "replay_node_labels"),
    "parameter-server": ("worker_node_labels", "server_node_labels", "replay_node_labels"),
}
"""Fields that version 7 added to topologies."""

_MIGRATIONS: dict[int, Callable[[Any], Any]] = {
    1: _migrate_from_1,
    2: _migrate_from_2,
    3: _migrate_from_3,
    4: _migrate_from_4,
    5: _migrate_from_5,
    6: _migrate_from_6,
    7: _migrate_from_7,
}
"""Functions that convert content to the next version, by the version that they convert from."""


def _decode(kind: type, content: Any, name: str) -> Any:
    """Returns the config of class `kind` that was read from JSON; its constructor checks the fields' types."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must be an object, got {show(content)}")
    if fields.keys() != set(content):
        missing, unknown = sorted(fields.keys() - set(content)), sorted(set(content) - fields.keys())
        raise ConfigError(f"{name} must have exactly its known fields, got missing {missing}, unknown {unknown}")
    return kind(**{field: _decode_field(fields[field], value, f"{name}.{field}") for field, value in content.items()})


def _decode_field(kind: Any, value: Any, name: str) -> Any:
    if kind is TopologyConfig:
        return decode_topology(value, name)
    return _decode(kind, value, name) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else value
