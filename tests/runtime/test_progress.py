"""The progress view: live in a terminal, lines in a log, silence on request."""

import io
import math
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from qfleet.runtime import progress
from qfleet.runtime.activity import announce, announced_to
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


def screen(view_of: Callable[[ProgressView], None], width: int) -> list[str]:
    """Returns the lines that a terminal of this width would show of a view."""
    view = ProgressView(5_000_000, stream=Terminal())
    with view:
        view_of(view)
        assert view._live is not None
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        console.print(view._live.renderable, end="")
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


FUSED = {
    "env_steps": 1_234_567, "learner_steps": 100, "episode_return_mean": 123.4, "eval_return_mean": 500.0,
    "exploration": 0.05, "loss": 0.0123,
}  # fmt: skip
ACTOR_LEARNER = FUSED | {
    "fleet_actors_ready": 2, "fleet_learner_waiting": 0.1, "fleet_actors_waiting": 0.9, "staleness": 12,
    "fleet_replay_transitions": 100_000, "fleet_restarts": 1,
}  # fmt: skip
GOSSIP = FUSED | {"fleet_peers_ready": 4, "fleet_consensus_distance": 0.123, "fleet_exchanges_per_second": 12.3}


@pytest.mark.parametrize(
    ("record", "width", "labels"),
    [
        (FUSED, 80, ["env steps", "steps/s", "updates/s", "return", "eval", "left"]),
        (FUSED, 100, ["env steps", "steps/s", "updates/s", "return", "eval", "exploration", "loss", "left"]),
        (FUSED, 20, ["env steps"]),
        (ACTOR_LEARNER, 80, ["env steps", "steps/s", "return", "eval", "actors", "restarts", "left"]),
        (
            ACTOR_LEARNER, 100,
            ["env steps", "steps/s", "return", "eval", "actors", "waiting", "restarts", "left"],
        ),
        (
            ACTOR_LEARNER, 150,
            ["env steps", "steps/s", "updates/s", "return", "eval", "exploration", "loss", "actors", "waiting",
             "staleness", "restarts", "left"],
        ),
        (GOSSIP, 80, ["env steps", "steps/s", "return", "eval", "peers", "apart", "left"]),
    ],
)  # fmt: skip
def test_each_label_stands_above_its_value_in_a_terminal_of_any_width(
    clock: Clock, record: dict[str, float], width: int, labels: list[str]
) -> None:
    def train(view: ProgressView) -> None:
        view.update(record | {"env_steps": 0, "learner_steps": 0})
        clock.seconds = 1.0
        view.update(record)

    lines = screen(train, width)
    assert len(lines) == 3 and max(map(len, lines)) <= width, "nothing is wrapped"
    bar, header, values = lines
    assert set(bar) <= set("━╸╺")
    assert re.split(r"  +", header) == labels
    for label in labels:
        assert values[header.index(label) :][:1] not in ("", " "), f"there is a value below {label}"
    assert values.startswith("1,234,567/5,000,000"[:width])


@pytest.mark.parametrize("width", [80, 100, 150])
def test_what_a_run_is_busy_with_stands_beside_the_bar(clock: Clock, width: int) -> None:
    def evaluate(view: ProgressView) -> None:
        view.update(FUSED)
        view.status("evaluating 20 episodes")
        clock.seconds = 65.0
        view.status("evaluating 3 of 20")

    bar, header, _ = screen(evaluate, width)
    assert bar.endswith("  evaluating 3 of 20 1:05") and len(bar) <= width
    assert header.startswith("env steps")


def test_a_run_compiles_before_its_first_record(clock: Clock) -> None:
    def compile_it(view: ProgressView) -> None:
        view.status("compiling")
        clock.seconds = 7.0

    (line,) = screen(compile_it, 80)
    assert line.endswith("compiling 0:07")


def test_a_status_ends_with_the_next_record_and_a_brief_one_is_not_shown(clock: Clock) -> None:
    def evaluate(view: ProgressView) -> None:
        view.status("evaluating 20 episodes")
        clock.seconds = 1.0
        view.update(FUSED)
        view.status("saving")
        clock.seconds = 1.2

    assert set(screen(evaluate, 80)[0]) <= set("━╸╺")


def test_a_log_gets_a_status_only_if_nothing_else_was_said_for_a_while(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressView(10, stream=log, plain_period_seconds=5.0) as view:
        view.status("compiling")
        view.update({"env_steps": 1})
        for second in range(1, 13):
            clock.seconds = second
            view.status(f"evaluating {second} of 20")
    assert log.getvalue().splitlines() == ["env steps 1/10 (10%)", "evaluating 6 of 20", "evaluating 11 of 20"]


def test_training_goes_on_if_nobody_reads_its_progress_any_more(clock: Clock) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with ProgressView(10, stream=Broken(), plain_period_seconds=0.0) as view:
        view.message("CartPole-v1")
        view.update({"env_steps": 1})
        view.status("saving")
        view.message("next")
    assert view.is_unwritable


def test_what_is_announced_reaches_the_innermost_listener() -> None:
    outer: list[str] = []
    inner: list[str] = []
    announce("nobody hears this")
    with announced_to(outer.append):
        with announced_to(inner.append):
            announce("compiling")
        announce("saving")
    assert (outer, inner) == (["saving"], ["compiling"])


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with ProgressView(10, stream=terminal) as view:
        view.update({"env_steps": 1})
    assert terminal.getvalue() == "env steps 1/10 (10%)\n"


def test_messages_reach_a_log_as_lines(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressView(10, stream=log) as view:
        view.message("resumed at 5")
    assert log.getvalue() == "resumed at 5\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (5025, "1:23:45")])
def test_time_left_reads_as_a_clock(seconds: float, text: str) -> None:
    assert progress._clock(seconds) == text
