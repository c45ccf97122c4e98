"""`qfleet envs`."""

import dataclasses
from collections.abc import Sequence

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EnvsFlags:
    """Lists the environments by name."""

    suite: tyro.conf.Positional[str] = ""
    """gymnax, octax, pgx or xminigrid, to list the names of this suite instead."""


def run(arguments: Sequence[str]) -> int:
    """Lists the environments."""
    flags = tyro.cli(_EnvsFlags, prog="qfleet envs", args=list(arguments))
    from qfleet.envs.registry import list_envs, list_suite

    if flags.suite:
        print("\n".join(list_suite(flags.suite)))
        return 0
    for name, summary in list_envs():
        print(f"{name:<32} {summary}")
    return 0
