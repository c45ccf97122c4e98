"""A run in a notebook: a bar of progress and a curve while it trains, and what it is when it is looked at.

Everything is plain HTML with inline SVG, which takes the notebook's own colours. IPython is never imported here: if the
code runs in a kernel, it has been imported already.
"""

import contextlib
import html
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qfleet.config import ConfigError
from qfleet.envs.failures import describe
from qfleet.runtime.activity import announced_to
from qfleet.runtime.metrics_reading import Metrics, MetricsReader
from qfleet.runtime.progress import ProgressView

logger = logging.getLogger("qfleet")

REFRESH_SECONDS = 0.5
"""Time between two pictures. A notebook keeps only the newest."""

MAX_POINTS = 400
"""Largest number of points that a line has. If there are more, every other one is left out."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 200, 56, 22, 8
_ACCENT = "#3b82f6"  # readable on white and on black

_TRAINING, _EVALUATION = "episode_return_mean", "eval_return_mean"


def is_notebook() -> bool:
    """Returns whether this code runs in the kernel of a notebook, which can show and replace HTML."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class Curve:
    """The returns of a run against environment steps: of training, of evaluations, and of each seed's evaluations."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[float, float]]] = {}
        """Points of each line, by the name of its metric."""

    @classmethod
    def of(cls, metrics: Path) -> "Curve":
        """Returns the curve of a run's metrics.jsonl. One that can't be read gives an empty curve."""
        try:
            return cls.of_columns(MetricsReader(metrics).read())
        except ConfigError:
            return cls()

    @classmethod
    def of_columns(cls, columns: Metrics) -> "Curve":
        """Returns the curve of metrics that have been read already."""
        curve = cls()
        for name in filter(_is_shown, columns):
            for env_steps, value in zip(columns["env_steps"].tolist(), columns[name].tolist(), strict=True):
                curve._add(name, env_steps, value)
        return curve

    def add(self, record: Mapping[str, float | None]) -> None:
        """Adds the returns of a record."""
        for name in filter(_is_shown, record):
            value = record[name]
            if value is not None:
                self._add(name, float(record["env_steps"] or 0), float(value))

    def _add(self, name: str, env_steps: float, value: float) -> None:
        if math.isfinite(value):
            points = self.lines.setdefault(name, [])
            points.append((env_steps, value))
            if len(points) > MAX_POINTS:
                del points[1:-1:2]

    def svg(self) -> str:
        """Returns a picture of the curve, or nothing if there is no point yet."""
        points = [point for line in self.lines.values() for point in line]
        if not points:
            return ""
        most_steps = max(steps for steps, _ in points) or 1.0
        low, high = min(value for _, value in points), max(value for _, value in points)
        if low == high:
            low, high = low - 0.5, high + 0.5

        def place(point: tuple[float, float]) -> str:
            x = _LEFT + point[0] / most_steps * (_WIDTH - _LEFT - 8)
            y = _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
            return f"{x:.1f},{y:.1f}"

        seeds = sorted(name for name in self.lines if name.startswith(f"{_EVALUATION}_seed_"))
        styles = dict.fromkeys(seeds, f'stroke="{_ACCENT}" stroke-width="1" opacity="0.5"')
        styles |= {
            _TRAINING: 'stroke="currentColor" stroke-width="1" opacity="0.45"',
            _EVALUATION: f'stroke="{_ACCENT}" stroke-width="2"',
        }
        lines = [
            f'<polyline points="{" ".join(map(place, self.lines[name]))}" fill="none" {style}/>'
            for name, style in styles.items()
            if name in self.lines
        ]
        bottom, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
        words = [
            _words(_LEFT - 6, _TOP + 10, "end", f"{high:.4g}"),
            _words(_LEFT - 6, bottom, "end", f"{low:.4g}"),
            _words(_LEFT - 6, middle + 4, "end", "return"),
            _words(_LEFT, _HEIGHT - 6, "start", "0"),
            _words(_WIDTH - 8, _HEIGHT - 6, "end", f"{most_steps:,.0f} environment steps"),
        ]
        axes = f'<path d="M{_LEFT},{_TOP}V{bottom}H{_WIDTH - 8}" fill="none" stroke="currentColor" opacity="0.4"/>'
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" style="width:100%;max-width:{_WIDTH}px;display:block" role="img" '
            f'aria-label="returns against environment steps">{axes}{"".join(lines)}{"".join(words)}</svg>'
        )


def run_html(title: str, state: str, *, completed: float, details: str, curve: Curve, after: str = "") -> str:
    """Returns what a notebook shows of a run.

    Args:
      title: which run it is.
      state: what it is doing, or how it ended.
      completed: share of the run that is done, in [0, 1].
      details: figures.
      curve: its returns.
      after: lines of code that go on from here.
    """
    track = "background:color-mix(in srgb, currentColor 15%, transparent);height:6px;border-radius:3px"
    bar = f"width:{100 * completed:.1f}%;background:{_ACCENT};height:6px;border-radius:3px"
    legend = ""
    if curve.lines:
        marks = (("evaluation", f"color:{_ACCENT}"), ("training, with exploration", "opacity:0.45"))
        legend = " ".join(f'<span style="{style}">&#9644;</span> {name}' for name, style in marks)
    parts = [
        f"<div><b>{html.escape(title)}</b>: {html.escape(state)}</div>",
        f'<div style="{track};margin:6px 0"><div style="{bar}"></div></div>',
        f'<div style="opacity:0.75">{html.escape(details)}</div>' if details else "",
        curve.svg(),
        f'<div style="opacity:0.75;font-size:11px">{legend}</div>' if legend else "",
        f'<div>next:<br><code style="white-space:pre-wrap">{html.escape(after)}</code></div>' if after else "",
    ]
    return f'<div style="font:13px system-ui,sans-serif;max-width:{_WIDTH}px;line-height:1.5">{"".join(parts)}</div>'


def _words(x: float, y: float, anchor: str, text: str) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="currentColor" font-size="11" '
        f'font-family="system-ui,sans-serif" opacity="0.75">{html.escape(text)}</text>'
    )


def _is_shown(name: str) -> bool:
    return name in (_TRAINING, _EVALUATION) or name.startswith(f"{_EVALUATION}_seed_")


class NotebookView(ProgressView):
    """Context manager that shows a run's progress in a notebook, as `ProgressView` does in a terminal."""

    def __init__(self, title: str, curve: Curve) -> None:
        """Prepares the view.

        Args:
          title: which run it is.
          curve: its returns so far, to which the view adds those that come.
        """
        super().__init__()
        self._is_live, self._period_seconds = True, REFRESH_SECONDS
        self._title, self._curve, self._result = title, curve, ""
        self._display: Any = None

    def update(self, record: Mapping[str, float | None]) -> None:
        """Shows a progress record, unless another was shown a moment ago."""
        self._curve.add(record)
        super().update(record)

    def end(self, content: str) -> None:
        """Shows how the run ended, in place of its progress."""
        self._result = content
        self._refresh(is_due=True)

    def _refresh(self, *, is_due: bool) -> None:
        if not is_due or self._quiet:
            return
        completed = min(1.0, self._latest.get("env_steps", 0.0) / max(1, self._total))
        details = " \u00b7 ".join(f"{name} {value}" for name, value in self._columns()) if self._latest else ""
        state = self._status[0] if self._status else "training" if self._latest else "starting"
        content = self._result or run_html(self._title, state, completed=completed, details=details, curve=self._curve)
        self._shown_at = time.monotonic()
        try:
            self._display_html({"text/html": content, "text/plain": self._title})
        except Exception as error:  # whatever it is, it must not cost the run
            self._quiet = True
            logger.warning("the notebook can't show the run any more; the run goes on: %s", describe(error))

    def _display_html(self, bundle: dict[str, str]) -> None:
        if self._display is None:
            from IPython.display import display

            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)


@contextlib.contextmanager
def shown_while_starting() -> Iterator[None]:
    """Shows what a run that starts in a notebook is busy with, until it has. Elsewhere it does nothing."""
    if not is_notebook():
        yield
        return
    view = NotebookView("a run", Curve())
    with announced_to(view.status):
        try:
            yield
        finally:
            if view._display is not None:
                view.end("<div></div>")
