"""Shared by commands with `--topology`: the flags of all topologies, and finding its value before parsing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qfleet.config import TOPOLOGIES, MeshConfig, TopologyConfig
from qfleet.config.topologies import RENAMED, check_suits, check_topology_name, field_names, without_alias


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Returns the value of a flag before all are parsed, because the defaults of other flags depend on it."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def replace_alias(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with `--topology decentralised [--exchange NAME]` replaced by the topology it stands for.

    Raises:
      ConfigError: if an exchange is given with another topology.
    """
    topology, exchange = value_of("--topology", arguments), value_of("--exchange", arguments)
    if topology != "decentralised" and exchange is None:
        return list(arguments)
    name = without_alias(topology, exchange)
    others = _without(_without(list(arguments), "--topology"), "--exchange")
    return others if name is None else [*others, "--topology", name]


def topology_flags() -> dict[str, Any]:
    """Returns the types of the flags that choose a topology and set it, by name: the settings of all topologies."""
    kinds: dict[str, Any] = {"topology": str, "exchange": str}
    for topology in TOPOLOGIES.values():
        for field in dataclasses.fields(topology):
            known = kinds.get(field.name, field.type)
            kinds[field.name] = known if known == field.type else known | field.type  # such as `str` and `str | None`
    kinds |= {earlier: kinds[name] for earlier, name in RENAMED.items() if earlier not in kinds}
    del kinds["mesh"]
    return kinds | {f"mesh.{field.name}": field.type for field in dataclasses.fields(MeshConfig)}


def take_mesh(given: dict[str, Any]) -> dict[str, int]:
    """Takes the settings of a mesh out of the flags that a command line gives, and returns them."""
    return {name: given.pop(f"mesh.{name}") for name in ("data", "model") if f"mesh.{name}" in given}


def topology_with(recorded: TopologyConfig, given: dict[str, Any]) -> TopologyConfig:
    """Returns a topology as `recorded`, but with the settings that flags give; another topology keeps its lanes.

    Args:
      recorded: the topology of a run or of a file.
      given: names and values of flags of topologies.

    Raises:
      ConfigError: if there is no such topology, or a setting belongs to another one.
    """
    settings = dict(given)
    name = without_alias(settings.pop("topology", None), settings.pop("exchange", None)) or recorded.name
    check_topology_name(name)
    kind, mesh = TOPOLOGIES[name], take_mesh(settings)
    for setting in (*settings, *(["mesh"] if mesh else [])):
        check_suits(setting, name)
    default = recorded
    if name != recorded.name:
        default = kind(**({"num_envs": recorded.num_envs} if "num_envs" in field_names(kind) else {}))
    if mesh:
        settings["mesh"] = dataclasses.replace(default.mesh, **mesh)
    return dataclasses.replace(default, **settings)


def _without(arguments: list[str], flag: str) -> list[str]:
    """Returns the arguments without a flag and its value."""
    if flag in arguments:
        i = arguments.index(flag)
        return arguments[:i] + arguments[i + 2 :]
    return [argument for argument in arguments if not argument.startswith(f"{flag}=")]
