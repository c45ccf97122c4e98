"""`qfleet plan` measures the parts of a run once, predicts it, and starts no run."""

import json
from pathlib import Path

import pytest

from qfleet.cli.main import main

SMALL = ("CartPole-v1", "--preset", "dqn", "--hidden-sizes", "8", "--batch-size", "8", "--num-envs", "4")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an empty folder the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_measures_once_and_starts_no_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = plan(capsys, *SMALL, "--measure")
    again = plan(capsys, *SMALL, "--env-steps", "1000000")
    assert (first["were_measured"], again["were_measured"]) == (True, False)
    assert again["costs"] == first["costs"]
    assert again["speed"]["env_steps_per_second"] > 0
    assert again["seconds"] > first["seconds"]
    assert [each["change"] for each in first["what_if"]] == ["one more lane", "one more core"]
    assert list(here.iterdir()) == []


def test_a_fleet_is_planned_for_nodes_that_are_not_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    (here / "cluster.toml").write_text(
        "[[nodes]]\ncores = 4\nroles = ['director', 'learner', 'replay shard']\n"
        "[[nodes]]\ncount = 2\ncores = 2\nroles = ['actor']\n[costs]\nlearn = 0.5\n"
    )
    fleet = ("--topology", "actor-learner", "--num-actors", "2", "--lanes-per-actor", "2", "--rows-per-chunk", "4")
    flags = (*SMALL[:-2], *fleet)
    on_nodes = plan(capsys, *flags, "--cluster", "cluster.toml")
    on_this = plan(capsys, *flags)
    assert on_nodes["place"] == "3 nodes, 8 cores"
    assert on_nodes["speed"]["wire_bytes_per_env_step"] > on_this["speed"]["wire_bytes_per_env_step"] == 0
    assert not on_this["were_measured"]
    assert on_nodes["costs"]["learn"]["cpu_seconds"] == pytest.approx(on_this["costs"]["learn"]["cpu_seconds"] / 2)
    assert set(on_this["process_memory_bytes"]) >= {"actor", "learner", "replay shard"}


def test_a_plan_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL]) == 0
    shown = capsys.readouterr().out
    for words in ("environment steps/s", "learner steps/s", "what limits it", "memory", "one more lane"):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-seeds", "2"), "a plan must be of one seed, got num_seeds=2; leave --num-seeds out"),
        (("--cluster",), "--cluster must be followed by a file"),
        (("--cluster", "nowhere.toml"), "--cluster must be a file that can be read, got nowhere.toml"),
        (
            ("--cluster", "a.toml", "--cluster", "b.toml"),
            "--cluster must be given once, got it twice, first with a.toml",
        ),
        (("--print-config",), "--print-config belongs to `qfleet train`"),
        (("--topology", "overlapped"), "a topology must suit the environment"),
    ],
)
def test_bad_input_gets_one_error(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["plan", *SMALL, *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
