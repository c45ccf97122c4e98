"""The progress view: live in a terminal, lines in a log, silence on request."""

import io
import math

import pytest

from qfleet.runtime import progress
from qfleet.runtime.progress import ProgressView


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for the `time` module."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return clock


def test_a_log_gets_a_line_every_few_seconds_and_the_last_record(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressView(1000, stream=log, plain_period_seconds=5.0) as view:
        for second in range(9):
            clock.seconds = second
            view.update({"env_steps": 100 * second, "learner_steps": 20 * second, "loss": 0.25})
        assert len(log.getvalue().splitlines()) == 2
    assert log.getvalue().splitlines() == [
        "env steps 0/1,000 (0%)  loss 0.25",
        "env steps 500/1,000 (50%)  steps/s 100  updates/s 20  loss 0.25  left 0:05",
        "env steps 800/1,000 (80%)  steps/s 100  updates/s 20  loss 0.25  left 0:02",
    ]


def test_rates_and_time_left_are_those_of_the_last_seconds(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressView(100_000, stream=log, plain_period_seconds=0.0) as view:
        view.update({"env_steps": 0})
        for second in range(60, 90):  # a minute of compiling, then 1,000 steps/s
            clock.seconds = second
            view.update({"env_steps": 1000 * (second - 59)})
    assert log.getvalue().splitlines()[-1] == "env steps 30,000/100,000 (30%)  steps/s 1,000  left 1:10"


def test_missing_and_undefined_values_keep_their_last_showing(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressView(10, stream=log, plain_period_seconds=0.0) as view:
        view.update({"env_steps": 1, "episode_return_mean": None, "loss": math.nan, "exploration": 0.5})
        view.update({"env_steps": 2, "episode_return_mean": 9.0, "eval_return_mean": 475.25, "exploration": math.inf})
        view.update({"env_steps": 30, "eval_return_mean": None, "unheard_of": 3.0})
    assert log.getvalue().splitlines() == [
        "env steps 1/10 (10%)  exploration 0.500",
        "env steps 2/10 (20%)  return 9.0  eval 475.2  exploration 0.500",
        "env steps 30/10 (100%)  return 9.0  eval 475.2  exploration 0.500",
    ]


def test_quiet_shows_nothing(clock: Clock) -> None:
    for stream in (io.StringIO(), Terminal()):
        with ProgressView(10, quiet=True, stream=stream) as view:
            view.update({"env_steps": 1})
            view.message("checkpoint written")
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_view_and_messages_above_it(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressView(1000, stream=terminal) as view:
        view.update({"env_steps": 100})
        clock.seconds = 1.0
        view.update({"env_steps": 600, "exploration": 0.05, "loss": 0.125})
        view.message("checkpoint [bold] written")
    shown = terminal.getvalue()
    for text in ("600/1,000 (60%)", "500", "0.050", "0.125", "0:01", "checkpoint [bold] written", "━", "\x1b["):
        assert text in shown
    assert shown.rindex("600/1,000") > shown.index("checkpoint"), "the view stays below the message"


def test_messages_reach_a_log_as_lines(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressView(10, stream=log) as view:
        view.message("resumed at 5")
    assert log.getvalue() == "resumed at 5\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (5025, "1:23:45")])
def test_time_left_reads_as_a_clock(seconds: float, text: str) -> None:
    assert progress._clock(seconds) == text
