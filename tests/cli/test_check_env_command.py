"""`qfleet check-env`."""

import probes
import pytest

import qfleet
from qfleet.cli.main import main


def test_check_env_prints_a_line_for_each_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-env", "gym:FrozenLake-v1", "--steps", "50"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "gym:FrozenLake-v1 (gymnasium)"
    assert len(lines) > 10 and all(line.startswith("ok ") for line in lines)


def test_check_env_ends_with_1_if_something_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    qfleet.register_env("NaN-v1", lambda: probes.nan_reward(at_step=20))
    assert main(["check-env", "NaN-v1", "--steps", "50"]) == 1
    assert "FAIL training: numbers are finite" in capsys.readouterr().out
