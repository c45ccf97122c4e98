"""`qfleet envs`."""

from collections.abc import Sequence

import tyro


def run(arguments: Sequence[str]) -> int:
    """Lists the environments."""
    tyro.cli(_list, prog="qfleet envs", args=list(arguments))
    return 0


def _list() -> None:
    """Lists the environments by name."""
    from qfleet.envs.registry import list_envs

    for name, summary in list_envs():
        print(f"{name:<32} {summary}")
