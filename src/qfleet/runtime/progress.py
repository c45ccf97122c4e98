"""Progress of a run, shown in a terminal or as lines of a log."""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

_REFRESH_SECONDS = 0.1  # in a terminal
_RATE_WINDOW_SECONDS = 10.0


class ProgressView:
    """Context manager that shows a run's progress: live in a terminal, as plain lines elsewhere, or not at all.

    Rates and the time left come from the last ten seconds. So the compilation at the start soon stops counting.
    """

    def __init__(
        self,
        total_env_steps: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        plain_period_seconds: float = 5.0,
    ) -> None:
        """Prepares the view.

        Args:
          total_env_steps: environment steps at which the run ends, over all lanes.
          quiet: show nothing, not even messages.
          stream: stream to write to, by default stdout. The view is live if it is a terminal.
          plain_period_seconds: wall time between plain lines.
        """
        self._total = total_env_steps
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stdout
        self._is_live = self._stream.isatty() and not quiet
        self._period_seconds = _REFRESH_SECONDS if self._is_live else plain_period_seconds
        self._live: Any = None  # rich.live.Live
        self._history: deque[tuple[float, float, float]] = deque()  # time, env steps, learner steps
        self._latest: dict[str, float] = {}
        self._shown_at = -math.inf
        self._is_shown = True  # whether the newest record is on the screen

    def update(self, record: Mapping[str, float | None]) -> None:
        """Shows a progress record, unless another was shown a moment ago.

        Known names are `env_steps` (required), `learner_steps`, `episode_return_mean`, `eval_return_mean`,
        `exploration` and `loss`. A fleet adds `staleness` and some names that begin with `fleet_`. Other names are
        ignored. If a value is None, NaN or absent, the previous one stays on show.
        """
        if self._quiet:
            return
        self._latest.update({k: float(v) for k, v in record.items() if v is not None and math.isfinite(v)})
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
            self._live.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._is_live:
            from rich.console import Console
            from rich.live import Live

            # A refresh thread would compete with training, and records come often enough without one.
            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_shown:
            self._show()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        else:
            print("  ".join(f"{name} {value}" for name, value in self._columns()), file=self._stream, flush=True)
        self._shown_at = time.monotonic()
        self._is_shown = True

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 3))
        columns = self._columns()
        table.add_row(*(name for name, _ in columns), style="dim")
        table.add_row(*(value for _, value in columns))
        return Group(ProgressBar(total=self._total, completed=min(self._latest["env_steps"], self._total)), table)

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
