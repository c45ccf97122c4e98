"""Standard streams that are closed, full, or shared with a library that prints."""

import ctypes
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qfleet.api
from qfleet.cli.main import main
from qfleet.cli.show import status_line
from qfleet.cli.streams import only_the_answer_on_stdout
from qfleet.runtime.activity import announce
from qfleet.runtime.evaluation import Episodes, EvaluationOptions

QFLEET = f"{sys.executable} -m qfleet"


def print_everywhere() -> None:
    """Prints as Python, C code, a child process and whoever writes to the descriptor do."""
    print("python")
    ctypes.CDLL(None).puts(b"c code")  # stays in a buffer of C
    subprocess.run(["echo", "child"], check=True)
    os.write(1, b"descriptor\n")


def test_only_the_answer_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with only_the_answer_on_stdout():
        print_everywhere()
    print("answer")
    captured = capfd.readouterr()
    assert captured.out == "answer\n"
    assert sorted(captured.err.split("\n")) == ["", "c code", "child", "descriptor", "python"]


def test_stdout_is_put_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), only_the_answer_on_stdout():
        raise ZeroDivisionError
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


def test_eval_prints_nothing_but_json_whatever_the_environment_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        def play_episodes(*_: Any, **__: Any) -> Episodes:
            print_everywhere()
            return Episodes(np.array([1.0, 3.0]), np.array([1, 3]), np.array([5, 6]), np.array([False, False]))

        print_everywhere()
        return SimpleNamespace(
            play_episodes=play_episodes,
            spec=SimpleNamespace(name="Loud-v0"),
            options=EvaluationOptions(),
            episode_limit=lambda options: 10,
        )

    monkeypatch.setattr(qfleet.api, "load", load)
    assert main(["eval", str(tmp_path), "--episodes", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["return_mean"] == 2.0


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


def test_closed_streams_are_silent() -> None:
    found = shell(f"{QFLEET} presets >&- 2>&- <&-")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert shell(f"{QFLEET} presets >&-").stderr == ""


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import sys; from qfleet.cli.streams import prepare_streams; prepare_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); sys.exit(file.fileno() <= 2)"
    )
    assert shell(f'{sys.executable} -c "{code}" >&- 2>&- <&-').returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_reader_that_has_had_enough_sees_no_error() -> None:
    found = shell(f"{QFLEET} envs | head -n 1")
    assert found.stdout.count("\n") == 1 and found.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_answer_that_cannot_be_written_is_an_error_in_one_line() -> None:
    found = shell(f"{QFLEET} presets > /dev/full")
    assert found.returncode == 1
    assert found.stderr.startswith("qfleet: error: ") and found.stderr.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "shown"),
    [
        (Terminal(), "xterm", "\r\x1b[Kevaluating 1 of 20\r\x1b[K"),
        (Terminal(), "dumb", ""),
        (io.StringIO(), "xterm", ""),
    ],
    ids=["terminal", "dumb terminal", "log"],
)
def test_a_command_shows_in_a_terminal_what_it_is_busy_with(
    stream: io.StringIO, term: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    with status_line():
        announce("evaluating 1 of 20")
    assert stream.getvalue() == shown


def test_a_terminal_that_lacks_a_character_gets_it_as_an_escape() -> None:
    code = "from qfleet.cli.streams import prepare_streams; prepare_streams(); print('caf\\xe9', '\\udcff')"
    found = shell(f'PYTHONIOENCODING=ascii {sys.executable} -c "{code}"')
    assert (found.stdout, found.stderr) == ("caf\\xe9 \\udcff\n", "")
