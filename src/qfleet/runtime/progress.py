"""Progress of a run, shown in a terminal or as lines of a log."""

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_REFRESH_SECONDS = 0.1  # in a terminal
_REFRESHES_PER_SECOND = 2.0  # in a terminal, while no record comes
_RATE_WINDOW_SECONDS = 10.0
_BRIEF_SECONDS = 0.5  # a phase that takes less isn't shown in a terminal, where it would only flicker
_GAP = 2  # characters between columns
_FIRST_TO_GO = (
    "replay",
    "exchanges/s",
    "loss",
    "exploration",
    "staleness",
    "updates/s",
    "waiting",
    "apart",
    "left",
    "steps/s",
)
"""Columns that a narrow terminal does without, the least important one first. All others are kept for longer."""


def can_move_cursor(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal in which what it shows can be replaced."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class ProgressView:
    """Context manager that shows a run's progress: live in a terminal, as plain lines elsewhere, or not at all.

    Rates and the time left come from the last ten seconds. So the compilation at the start soon stops counting. If the
    stream can't be written to any more, because the terminal or the reader of a pipe has gone, the view falls silent.
    """

    def __init__(
        self,
        total_env_steps: int = 0,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        plain_period_seconds: float = 5.0,
    ) -> None:
        """Prepares the view.

        Args:
          total_env_steps: environment steps at which the run ends, over all lanes. `begin` sets it later.
          quiet: show nothing, not even messages.
          stream: stream to write to, by default stdout. The view is live if it is a terminal that can move its cursor.
          plain_period_seconds: wall time between plain lines.
        """
        self._total = total_env_steps
        self._quiet = quiet
        self.is_unwritable = False
        """Whether the stream has refused what was written to it."""
        self._stream = stream if stream is not None else sys.stdout
        self._is_live = can_move_cursor(self._stream) and not quiet
        self._period_seconds = _REFRESH_SECONDS if self._is_live else plain_period_seconds
        self._live: Any = None  # rich.live.Live, once there is something to show
        self._history: deque[tuple[float, float, float]] = deque()  # time, env steps, learner steps
        self._latest: dict[str, float] = {}
        self._status: tuple[str, float] | None = None  # what the run is busy with, and since when
        self._shown_at = -math.inf
        self._is_shown = True  # whether the newest record is on the screen

    def begin(self, total_env_steps: int) -> None:
        """Sets the environment steps at which the run ends, once they are known."""
        self._total = total_env_steps

    def status(self, text: str) -> None:
        """Shows what the run is busy with until its next record: "compiling", "evaluating 3 of 20".

        A log gets such a line only if it has had no other for a while.
        """
        if self._quiet or (self._is_live and self._status is not None and self._status[0] == text):
            return
        now = time.monotonic()
        shown, since = self._status or ("", now)
        is_same = shown.partition(" ")[0] == text.partition(" ")[0]  # "evaluating 3 of 20" goes on from "2 of 20"
        self._status = (text, since if is_same else now)
        if self._is_live:
            self._refresh(is_due=now - self._shown_at >= _REFRESH_SECONDS)
        elif now - max(self._shown_at, since) >= self._period_seconds:
            self._write(text)
            self._shown_at = now

    def update(self, record: Mapping[str, float | None]) -> None:
        """Shows a progress record, unless another was shown a moment ago.

        Known names are `env_steps` (required), `learner_steps`, `episode_return_mean`, `eval_return_mean`,
        `exploration` and `loss`. A fleet adds `staleness` and some names that begin with `fleet_`. Other names are
        ignored. If a value is None, NaN or absent, the previous one stays on show.
        """
        if self._quiet:
            return
        self._latest.update({k: float(v) for k, v in record.items() if v is not None and math.isfinite(v)})
        self._status = None
        now = time.monotonic()
        if self._history and self._latest["env_steps"] < self._history[-1][1]:
            self._history.clear()  # the run went back to a checkpoint
        self._history.append((now, self._latest["env_steps"], self._latest.get("learner_steps", 0.0)))
        while len(self._history) > 2 and now - self._history[0][0] > _RATE_WINDOW_SECONDS:
            self._history.popleft()
        self._is_shown = False
        if now - self._shown_at >= self._period_seconds:
            self._show()

    def message(self, text: str) -> None:
        """Prints a line above the live view, where it stays."""
        if self._live is not None:
            with self._silent_if_unwritable():
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            self._write(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status = None
        if not self._is_shown:
            self._show()
        elif self._live is not None:
            self._refresh(is_due=True)
        if self._live is not None:
            with self._silent_if_unwritable():
                self._live.stop()
            self._live = None

    def _show(self) -> None:
        if self._is_live:
            self._refresh(is_due=True)
        else:
            self._write("  ".join(f"{name} {value}" for name, value in self._columns()))
            self._shown_at = time.monotonic()
        self._is_shown = True

    def _refresh(self, *, is_due: bool) -> None:
        """Makes the live view show what is known now: at once if that is due, otherwise within half a second."""
        with self._silent_if_unwritable():
            if self._live is None:
                from rich.console import Console
                from rich.live import Live

                # Its thread refreshes the view while a long phase brings no record: compiling, a long evaluation.
                self._live = Live(console=Console(file=self._stream), refresh_per_second=_REFRESHES_PER_SECOND)
                self._live.start()
            completed = min(1.0, self._latest.get("env_steps", 0.0) / max(1, self._total))
            columns = self._columns() if self._latest else []
            self._live.update(_Panel(completed, columns, self._status), refresh=is_due)
            if is_due:
                self._shown_at = time.monotonic()

    def _write(self, line: str) -> None:
        with self._silent_if_unwritable():
            print(line, file=self._stream, flush=True)

    @contextlib.contextmanager
    def _silent_if_unwritable(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # nobody can read a complaint, and training must not end because of it
            self._quiet, self._is_live, self.is_unwritable = True, False, True

    def _columns(self) -> list[tuple[str, str]]:
        """Returns the names and texts to show."""
        env_steps = self._latest["env_steps"]
        columns = [("env steps", f"{env_steps:,.0f}/{self._total:,} ({min(1.0, env_steps / self._total):.0%})")]
        first, last = self._history[0], self._history[-1]
        seconds = last[0] - first[0]
        if seconds > 0:
            env_rate = (last[1] - first[1]) / seconds
            columns.append(("steps/s", f"{env_rate:,.0f}"))
            if "learner_steps" in self._latest:
                columns.append(("updates/s", f"{(last[2] - first[2]) / seconds:,.0f}"))
        for name, label, form in (
            ("episode_return_mean", "return", ".1f"),
            ("eval_return_mean", "eval", ".1f"),
            ("exploration", "exploration", ".3f"),
            ("loss", "loss", ".3g"),
        ):
            if name in self._latest:
                columns.append((label, format(self._latest[name], form)))
        columns += _fleet_columns(self._latest)
        if seconds > 0 and env_rate > 0:
            columns.append(("left", _clock(max(0.0, self._total - env_steps) / env_rate)))
        return columns


class _Panel:
    """The live view: a bar of progress with the run's status, and below it labels above values. Nothing is wrapped."""

    def __init__(self, completed: float, columns: Sequence[tuple[str, str]], status: tuple[str, float] | None) -> None:
        """Prepares the view.

        Args:
          completed: share of the run that is done, in [0, 1].
          columns: labels and values.
          status: what the run is busy with, and since when.
        """
        self._completed = completed
        self._columns = columns
        self._status = status

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        width = options.max_width
        status = ""
        if self._status is not None:
            text, since = self._status
            seconds = time.monotonic() - since
            status = f"  {text} {_clock(seconds)}" if seconds >= _BRIEF_SECONDS else ""
        bar_width = width - len(status)
        if bar_width > 0:
            yield ProgressBar(total=1.0, completed=self._completed, width=bar_width)  # ends without a newline
        yield Text(status[:width], no_wrap=True, style="cyan")
        if self._columns:
            columns = columns_that_fit(self._columns, width)
            for i, style in ((0, "dim"), (1, "")):
                cells = (column[i].ljust(max(map(len, column))) for column in columns)
                yield Text((" " * _GAP).join(cells)[:width], no_wrap=True, style=style)


def columns_that_fit(columns: Sequence[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """Returns the labels and values that fit side by side into `width` characters, in their order.

    The least important ones are left out. The first one is always kept.
    """
    kept = list(columns)
    to_go = [label for label in _FIRST_TO_GO if label in dict(columns)]
    to_go += [label for label, _ in reversed(columns) if label not in to_go]
    while len(kept) > 1 and sum(max(map(len, column)) + _GAP for column in kept) - _GAP > width:
        label = to_go.pop(0)
        kept = [column for column in kept if column[0] != label]
    return kept


def _fleet_columns(latest: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns how a fleet is doing: which processes are there, which of them wait, and how often one was restarted."""

    def values_with(ending: str) -> dict[str, float]:
        names = {name: name.removeprefix("fleet_").removesuffix(ending) for name in latest if name.endswith(ending)}
        return {short: latest[name] for name, short in names.items()}

    columns = [(name, f"{count:.0f}") for name, count in values_with("_ready").items()]
    if waiting := values_with("_waiting"):
        columns.append(("waiting", " ".join(f"{name} {share:.0%}" for name, share in waiting.items())))
        columns.append(("staleness", f"{latest['staleness']:.0f}"))
    if "fleet_consensus_distance" in latest:
        columns.append(("apart", f"{latest['fleet_consensus_distance']:.1%}"))
        columns.append(("exchanges/s", f"{latest['fleet_exchanges_per_second']:.1f}"))
    if "fleet_replay_transitions" in latest:
        columns.append(("replay", f"{latest['fleet_replay_transitions']:,.0f}"))
    if latest.get("fleet_restarts"):
        columns.append(("restarts", f"{latest['fleet_restarts']:.0f}"))
    return columns


def _clock(seconds: float) -> str:
    """Returns a duration as a clock shows it, such as 0:07, 12:34 or 1:23:45."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
