"""`qfleet doctor`."""

import dataclasses
from collections.abc import Sequence

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.cli.show import status_line
from qfleet.doctor.check import VERDICTS, Check
from qfleet.doctor.children import examine
from qfleet.runtime.activity import announce
from qfleet.runtime.run_directory import strict_json

_STYLES = {"good": "green", "warn": "yellow", "bad": "bold red"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DoctorFlags:
    """Says whether this machine is ready for runs: what is there, a verdict, and what to do if it isn't good.

    It looks at devices, packages and extras, threads, memory, shared memory, open files, the disk, the compile cache,
    Ray, and video. Each check runs in a process of its own and for at most 30 seconds. The exit code is 1 if something
    is bad, and 0 otherwise.
    """

    json: bool = False
    """Print one line of JSON."""


def run(arguments: Sequence[str]) -> int:
    """Examines this machine. The exit code is 1 if something is bad."""
    flags = tyro.cli(_DoctorFlags, prog="qfleet doctor", args=list(arguments), registry=FLAG_TYPES)
    with status_line():
        announce("looking at this machine")
        checks = examine()
    worst = max((check.verdict for check in checks), key=VERDICTS.index)
    if flags.json:
        print(strict_json({"verdict": worst, "checks": [check._asdict() for check in checks]}))
    else:
        _print(checks)
    return 1 if worst == "bad" else 0


def _print(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    for check in checks:
        words = check.found + (f"\n-> {check.remedy}" if check.remedy else "")
        table.add_row(Text(check.verdict, _STYLES[check.verdict]), Text(check.name, no_wrap=True), Text(words))
    console = Console(highlight=False)
    console.print(table)
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("warn", "bad")}
    if counts["bad"]:
        console.print(f"\n{counts['bad']} bad: a run that needs it would fail")
    elif counts["warn"]:
        console.print(f"\n{counts['warn']} to look at, but runs work")
    else:
        console.print("\nthis machine is ready for runs")
