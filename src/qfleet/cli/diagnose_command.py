"""`qfleet diagnose RUN`."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Annotated

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.runs import diagnose, open_run
from qfleet.runtime.diagnosis import Finding, shown
from qfleet.runtime.finding_runs import RUN_HELP
from qfleet.runtime.run_directory import strict_json

WIDTH = 80
"""Characters of a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DiagnoseFlags:
    """Says what is wrong with a run that doesn't learn: the figure, the threshold, its source, and what to change."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
    json: bool = False
    """Print one line of JSON."""


def run(arguments: Sequence[str]) -> int:
    """Diagnoses the run that the flags name. What it finds doesn't change the exit code."""
    flags = tyro.cli(_DiagnoseFlags, prog="qfleet diagnose", args=list(arguments), registry=FLAG_TYPES)
    opened = open_run(flags.run)
    findings = diagnose(opened)
    if flags.json:
        print(strict_json({"run": str(opened.path), "findings": [dataclasses.asdict(each) for each in findings]}))
        return 0
    env_steps = int(opened.metrics["env_steps"][-1]) if opened.metrics.num_records else 0
    print(f"{opened.config.env} with {opened.config.preset}, {env_steps:,} environment steps")
    if num_damaged := opened.metrics.num_damaged:
        lines = "1 damaged line" if num_damaged == 1 else f"{num_damaged:,} damaged lines"
        print(f"without {lines} of metrics.jsonl")
    for number, finding in enumerate(findings, 1):
        print(_in_words(number, finding))
    if not findings:
        print("nothing is wrong, as far as its metrics tell")
    return 0


def _in_words(number: int, finding: Finding) -> str:
    """Returns a finding in a paragraph of its own."""
    lines = [f"\n{number}. {finding.name} ({finding.severity})", _filled(finding.sentence, "   ")]
    for name, text in (
        ("figure", f"{shown(finding.figure)}, threshold {shown(finding.threshold)}"),
        ("source", finding.source),
        ("change", finding.knob),
    ):
        lines.append(_filled(f"{name}  {text}", "   ", "           "))
    return "\n".join(lines)


def _filled(text: str, indent: str, further: str | None = None) -> str:
    """Returns text in lines of at most `WIDTH` characters; `further` indents all lines but the first."""
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent if further is None else further,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
