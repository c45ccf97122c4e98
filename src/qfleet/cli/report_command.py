"""`qfleet report RUN [RUN ...]`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.config import ConfigError
from qfleet.runtime.finding_runs import find_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ReportFlags:
    """Writes the report of one run, or of several side by side, as one page that a browser shows without a network."""

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="RUN [RUN ...]",
            help="Folders of runs, the beginnings of their names, or `latest`: the newest run in runs/. Runs that "
            "differ only in their seeds are drawn as one curve with a band.",
        ),
    ]
    out: str | None = None
    """File to write. The default is report.html in the run's folder, and in the current folder for several runs."""


def run(arguments: Sequence[str]) -> int:
    """Writes the report of the runs that the flags name."""
    flags = tyro.cli(_ReportFlags, prog="qfleet report", args=list(arguments), registry=FLAG_TYPES)
    if not flags.runs:
        raise ConfigError("RUN must name at least one run, got none; give a run's folder, or `latest`")
    from qfleet.runtime.report.page import check_replaceable, write_report
    from qfleet.runtime.saved_run import SavedRun

    runs = [SavedRun(find_run(text)) for text in flags.runs]
    run = runs[0].directory
    default = run.as_named(run.report_path) if len(runs) == 1 else Path("report.html")
    out = flags.out or default
    check_replaceable(out)
    print(f"report: {write_report(runs, out)}")
    return 0
