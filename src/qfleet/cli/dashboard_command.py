"""`qfleet dashboard [RUNS ...]`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.config import ConfigError
from qfleet.config.checks import check_count
from qfleet.runtime.finding_runs import find_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DashboardFlags:
    """Shows the reports of runs in a browser, finished or under way, and draws them anew as metrics arrive."""

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[RUNS ...]",
            help="Runs to show, as for `qfleet report`, and folders of runs. The default is runs/.",
        ),
    ] = ("runs",)
    host: str = "127.0.0.1"
    """Address to listen on. On any but a loopback address, only the printed address with its token is answered."""
    port: int = 8787
    """Port to listen on. 0 takes a free one."""


def run(arguments: Sequence[str]) -> int:
    """Serves the dashboard that the flags describe, until it is interrupted."""
    flags = tyro.cli(_DashboardFlags, prog="qfleet dashboard", args=list(arguments), registry=FLAG_TYPES)
    check_count("port", flags.port, minimum=0, maximum=65_535)
    places = [Path(find_run(text)) for text in flags.runs]
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"RUNS must be folders, got {place}, which isn't one; give a run, or a folder of runs")
    from qfleet.runtime.report.dashboard import Dashboard

    dashboard = Dashboard(places, flags.host, flags.port)
    print(f"dashboard: {dashboard.address} (Ctrl-C ends it)", flush=True)
    if dashboard.token is not None:
        print("qfleet: whoever has this address can read these runs; it isn't encrypted", file=sys.stderr)
    dashboard.serve()
    return 0
