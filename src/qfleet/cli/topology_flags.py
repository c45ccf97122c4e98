"""Shared by commands with `--topology`: finding its value before parsing, and refusing flags of other topologies."""

from collections.abc import Sequence

from qfleet.config import TOPOLOGIES
from qfleet.config.topologies import RENAMED, check_suits, field_names, without_alias


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


def check_flags(arguments: Sequence[str], topology: str) -> None:
    """Checks that no flag belongs to another topology; tyro would only say that it is unknown.

    Raises:
      ConfigError: if one does.
    """
    known = {name for kind in TOPOLOGIES.values() for name in (*field_names(kind), *kind.settings_without_effect)}
    given = {argument.partition("=")[0] for argument in arguments}
    for setting in sorted(known | set(RENAMED)):
        if f"--{setting.replace('_', '-')}" in given:
            check_suits(setting, topology)


def _without(arguments: list[str], flag: str) -> list[str]:
    """Returns the arguments without a flag and its value."""
    if flag in arguments:
        i = arguments.index(flag)
        return arguments[:i] + arguments[i + 2 :]
    return [argument for argument in arguments if not argument.startswith(f"{flag}=")]
