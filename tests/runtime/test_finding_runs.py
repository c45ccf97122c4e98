"""The run that RUN means: a folder, the newest one, or the beginning of its name."""

import os
from pathlib import Path

import pytest

from qfleet.cli.main import main
from qfleet.config import ConfigError
from qfleet.runtime.finding_runs import find_run


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(name: str, began_at: int) -> str:
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    os.utime(path / "config.json", (began_at, began_at))
    return str(path)


def test_latest_is_the_run_that_began_last(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("b", 1)
    newest = make_run("a", 2)
    Path("runs/c").mkdir()  # not a run
    assert find_run("latest") == newest
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"qfleet: latest is {newest}\n")


@pytest.mark.parametrize("text", ["CartPole-v1-dqn", "runs/CartPole-v1-dqn", "CartPole-v1-dqn-0-2"])
def test_the_beginning_of_one_name_is_enough(text: str) -> None:
    run = make_run("CartPole-v1-dqn-0-2026", 1)
    make_run("CartPole-v1-pqn-0-2026", 2)
    assert find_run(text) == run


def test_the_beginning_of_several_names_is_refused() -> None:
    first, second = make_run("CartPole-v1-dqn", 1), make_run("CartPole-v1-pqn", 2)
    with pytest.raises(ConfigError, match=f"got CartPole, with which 2 begin: {first}, {second}; give more of it"):
        find_run("CartPole")


def test_a_path_that_exists_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", 1)
    make_run("ab", 2)
    Path("latest").mkdir()
    assert [find_run(text) for text in (run, "latest", "runs", "no[such", "")] == [run, "latest", "runs", "no[such", ""]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["eval", "watch", "resume"])
def test_every_command_that_takes_a_run_takes_the_latest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    assert main([command, "latest"]) == 2
    assert "`latest` means the newest run in runs/, got none in" in capsys.readouterr().err
    run = make_run("broken", 1)
    assert main([command, "latest"]) == 2
    assert f"{run}/config.json" in capsys.readouterr().err


def test_the_latest_run_may_have_a_dangling_link_for_its_config() -> None:
    make_run("a", 1)
    broken = Path("runs/b")
    broken.mkdir()
    (broken / "config.json").symlink_to("nowhere")
    assert find_run("latest") == str(broken)


def test_a_name_that_no_folder_can_have_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "x" * 300]) == 2
    assert "RUN must be a run's folder, got xxx" in capsys.readouterr().err
