"""`qfleet zoo`."""

from collections.abc import Sequence

import tyro


def run(arguments: Sequence[str]) -> int:
    """Lists the agents of the zoo."""
    tyro.cli(_list, prog="qfleet zoo", args=list(arguments))
    return 0


def _list() -> None:
    """Lists the trained agents that come with qfleet, for `eval`, `watch`, `export` and `serve`."""
    from qfleet.exporting.record import read_exported
    from qfleet.runtime.zoo import FOLDER, agents

    for name in agents():
        exported = read_exported(FOLDER / name)
        assert exported is not None
        origin = exported.origin
        print(f"zoo:{name:<24} {origin.config.env}, {origin.config.preset}, {origin.env_steps:,} environment steps")
