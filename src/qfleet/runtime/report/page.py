"""Puts a report into one file: data, styles, script and plotly.js. The page asks no network for anything."""

import base64
import functools
import gzip
import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError
from qfleet.runtime.comparison import Comparison
from qfleet.runtime.diagnosis import diagnose, shown
from qfleet.runtime.report.facts import make_facts
from qfleet.runtime.report.figures import make_figures
from qfleet.runtime.run_directory import write_atomically
from qfleet.runtime.run_files import UnusableFile, open_regular
from qfleet.runtime.saved_run import SavedRun

MAX_VIDEO_BYTES = 2 * 2**20
"""Largest video that a report holds. The newest one that isn't larger is taken."""

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data:"
)
"""What the browser lets the page do: run what is in it, and ask nobody for anything."""

LIVE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "media-src data:; connect-src 'self'"
)
"""The same for the dashboard's page, which also asks its own server."""


def report_data(runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Returns all that a report shows, as JSON can hold it.

    Raises:
      ConfigError: if a file of a run can't be read.
    """
    comparison = Comparison(runs)
    return {
        "facts": make_facts(comparison),
        "figures": make_figures(comparison),
        "video": _video(runs[0]) if len(runs) == 1 else None,
        "findings": _findings(runs[0]) if len(runs) == 1 else [],
    }


def _findings(run: SavedRun) -> list[dict[str, str]]:
    """Returns what is wrong with a run, as the page's script shows it."""
    return [
        {
            "name": finding.name,
            "text": finding.sentence,
            "figure": shown(finding.figure),
            "threshold": f"{shown(finding.threshold)} ({finding.source})",
            "knob": finding.knob,
        }
        for finding in diagnose(run.metrics, run.config, run.summary)
    ]


def render(data: dict[str, Any]) -> str:
    """Returns the page that shows what `report_data` returned."""
    packed = f'<script type="text/plain" id="plotly">{packed_plotly()}</script>'
    return _page(data, title=data["facts"]["title"], policy=_POLICY, plotly=packed, scripts=["page.js"])


def render_live() -> str:
    """Returns the page of the dashboard, which asks its server for data and for plotly.js."""
    script = '<script src="plotly.js"></script>'
    return _page(None, title="qfleet dashboard", policy=LIVE_POLICY, plotly=script, scripts=["page.js", "live.js"])


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Checks that a report wouldn't take the place of anything but an older report, or of an empty file.

    Raises:
      ConfigError: if it would.
    """
    head = _read("page.html").partition("{policy}")[0].encode()
    try:
        with open_regular(Path(path)) as file:
            is_replaceable = file.read(len(head)) in (head, b"")
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, UnusableFile):
        is_replaceable = False
    if not is_replaceable:
        raise ConfigError(
            f"a report must not replace anything but an older report, got {path}, which is something else; give "
            f"another --out, or move it away"
        )


def write_report(runs: Sequence[SavedRun], path: str | os.PathLike[str]) -> Path:
    """Writes the report of one or several runs as one file, which replaces an older one as a whole.

    Raises:
      ConfigError: if a file of a run can't be read, or the report can't be written.
    """
    file = Path(path)
    text = render(report_data(runs))
    try:
        write_atomically(file, text)
    except OSError as error:
        raise ConfigError(
            f"a report must be a file that can be written, got {file} ({error.strerror}); give another --out"
        ) from error
    return file


def _page(data: dict[str, Any] | None, *, title: str, policy: str, plotly: str, scripts: Sequence[str]) -> str:
    return _read("page.html").format(
        policy=html.escape(policy),
        title=html.escape(title),
        css=_read("page.css"),
        # In a script's text only "</" and "<!--" have a meaning, and JSON may spell "<" otherwise.
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        plotly=plotly,
        js="\n".join(map(_read, scripts)),
    )


def _read(name: str) -> str:
    return files("qfleet.runtime.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def packed_plotly() -> str:
    """Returns plotly.js, compressed and in base64."""
    return base64.b64encode(gzip.compress(plotly_script().encode(), compresslevel=1, mtime=0)).decode()


def plotly_script() -> str:
    """Returns the source of plotly.js."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script


def _video(run: SavedRun) -> str | None:
    """Returns the run's newest video that is small enough, as the address of its data."""
    for file in reversed(run.videos):
        try:
            with open_regular(file) as opened:
                content = opened.read(MAX_VIDEO_BYTES + 1)
        except (OSError, ValueError):  # it was deleted meanwhile, for example; an older one does as well
            continue
        if 0 < len(content) <= MAX_VIDEO_BYTES:
            return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return None
