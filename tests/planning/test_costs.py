"""Costs add up, and are kept on the disk for as long as nothing changes on which they depend."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qfleet.planning.costs import Cost, cost_of, key_of, read_costs, write_costs
from qfleet.presets import make_config


def test_one_after_the_other_adds_work_and_time() -> None:
    both = Cost(2.0, width=2.0, num_bytes=10).plus(Cost(1.0, wait_seconds=0.5, num_bytes=5))
    assert both == Cost(3.0, width=1.5, wait_seconds=0.5, num_bytes=15)
    assert both.seconds == 2.5


def test_time_that_another_program_took_is_no_waiting() -> None:
    """One of the calls was interrupted for a second; the others waited for nothing."""
    assert cost_of([1.0, 1.0, 1.0], [1.0, 1.0, 2.0]).wait_seconds == 0.0


def test_time_that_most_calls_wait_counts() -> None:
    assert cost_of([1.0, 1.0, 1.0], [2.0, 2.0, 2.5]).wait_seconds == 1.0


def test_a_call_that_waits_for_its_equal_has_waited_the_median() -> None:
    assert cost_of([1.0, 1.0, 1.0], [1.5, 2.0, 4.0], is_coupled=True).wait_seconds == 1.0


def test_work_is_a_mean_and_no_call_counts_many_times() -> None:
    assert cost_of([1.0, 1.0, 2.5], [3.0, 3.0, 3.0]).cpu_seconds == 1.5
    assert cost_of([1.0, 1.0, 1000.0], [1000.0] * 3).cpu_seconds == 2.0


def test_threads_make_a_part_wide() -> None:
    assert cost_of([2.0, 2.0], [1.0, 1.0]) == Cost(2.0, width=2.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps costs in a folder of their own."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("QFLEET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_costs_are_kept_until_a_part_changes(cache: Path) -> None:
    config = make_config("CartPole-v1", "dqn")
    costs = {"learn": Cost(1.0, width=2.0, num_bytes=3)}
    write_costs(key_of(config, "cpu"), costs)
    later = dataclasses.replace(config, seed=5, env_steps=10, agent=dataclasses.replace(config.agent, discount=0.9))
    assert read_costs(key_of(later, "cpu")) == costs
    wider = dataclasses.replace(config, agent=dataclasses.replace(config.agent, hidden_sizes=(8,)))
    assert read_costs(key_of(wider, "cpu")) is None
    assert read_costs(key_of(config, "another device")) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:50],
        lambda text: "[]",
        lambda text: 100_000 * "[",
        lambda text: text.replace('"width": 2.0', '"width": 0.0'),
        lambda text: text.replace('"width"', '"breadth"'),
    ],
)
def test_costs_that_are_damaged_are_measured_anew(cache: Path, damage: Callable[[str], str]) -> None:
    key = key_of(make_config("CartPole-v1"), "cpu")
    write_costs(key, {"learn": Cost(1.0, width=2.0)})
    (path,) = (cache / "plans").iterdir()
    assert read_costs(key) is not None
    path.write_text(damage(path.read_text()))
    assert read_costs(key) is None


def test_costs_that_are_no_file_are_measured_anew(cache: Path) -> None:
    key = key_of(make_config("CartPole-v1"), "cpu")
    write_costs(key, {})
    (path,) = (cache / "plans").iterdir()
    path.unlink()
    os.mkfifo(path)
    assert read_costs(key) is None


def test_costs_that_cannot_be_kept_are_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir()
    (cache / "plans").touch()
    write_costs(key_of(make_config("CartPole-v1"), "cpu"), {})
    assert "can't be kept in" in caplog.text


def test_the_file_says_what_its_costs_depend_on(cache: Path) -> None:
    write_costs(key_of(make_config("CartPole-v1"), "cpu"), {})
    (path,) = (cache / "plans").iterdir()
    assert json.loads(path.read_text())["key"]["env"] == ["CartPole-v1", {}]
