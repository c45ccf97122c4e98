"""What a run was started with: versions, devices and command of each start."""

import json
from pathlib import Path

import jax
import pytest

from qfleet.config import ConfigError, TrainConfig
from qfleet.runtime import environment_record
from qfleet.runtime.environment_record import describe_environment, differences, git_commit, record_start
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.saved_run import SavedRun

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", TrainConfig(env="CartPole-v1"))


def test_each_start_of_a_run_is_recorded(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_TEST_FLAG", "1")
    record_start(run)
    record_start(run)
    first, second = SavedRun(run.path).environment
    assert first["packages"]["jax"] == jax.__version__ and first["flags"]["XLA_TEST_FLAG"] == "1"
    assert second["devices"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": len(jax.devices())}
    assert second["memory_bytes"] > 2**28 and second["num_cores"] >= 1 and second["time"] >= first["time"]


def test_only_so_many_starts_are_kept(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_record, "_MAX_STARTS", 3)
    starts = [{"number": number} for number in range(6)]
    run.environment_path.write_text(json.dumps(starts))
    record_start(run)
    kept = SavedRun(run.path).environment
    assert [start.get("number") for start in kept] == [0, 5, None]


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_a_damaged_file_is_one_clear_error_and_the_next_start_replaces_it(run: RunDirectory, content: str) -> None:
    run.environment_path.write_text(content)
    with pytest.raises(ConfigError, match="environment.json must be"):
        _ = SavedRun(run.path).environment
    record_start(run)
    assert SavedRun(run.path).environment[-1]["packages"]


def test_a_file_that_cannot_be_written_is_a_warning(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    run.environment_path.mkdir()
    record_start(run)
    assert "environment.json can't be written" in caplog.text


def test_the_commit_is_read_without_running_git(tmp_path: Path) -> None:
    git, inner = tmp_path / ".git", tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert git_commit(tmp_path) is None or git_commit(tmp_path) == git_commit(tmp_path.parent)
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert git_commit(inner) is None
    (git / "packed-refs").write_text(f"# packed\n{COMMIT} refs/heads/main\n")
    assert git_commit(inner) == COMMIT
    (git / "refs/heads/main").write_text(COMMIT[::-1] + "\n")
    assert git_commit(inner) == COMMIT[::-1]
    (git / "HEAD").write_text(COMMIT + "\n")
    assert git_commit(inner) == COMMIT
    (git / "HEAD").write_text("nonsense\n")
    assert git_commit(inner) is None


def test_what_may_change_a_result_is_compared_and_nothing_else() -> None:
    now = describe_environment()
    assert differences(now, now) == differences(json.loads(json.dumps(now)), now) == []
    then = {
        **now,
        "time": "long ago",
        "memory_bytes": 1,
        "packages": {**now["packages"], "jax": "0.1", "envy": "2"},
        "flags": {**now["flags"], "XLA_OF_THEN": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
        "devices": {**now["devices"], "kind": "H100"},
        "git_commit": COMMIT,
    }
    assert [(each.what, each.then) for each in differences(then, now)] == [
        ("envy", "2"), ("jax", "0.1"), ("device kind", "H100"), ("XLA_OF_THEN", "1"), ("git commit", COMMIT),
    ]  # fmt: skip
    del now["devices"]
    assert "device kind" not in [each.what for each in differences(then, now)]


@pytest.mark.parametrize("then", [{}, {"packages": 3, "flags": None, "devices": ["x"], "python": {"a": "y" * 9_000}}])
def test_a_record_that_somebody_has_changed_is_compared_all_the_same(then: dict) -> None:
    found = differences(then, describe_environment())
    assert {"packages", "flags", "devices", "python"} <= {each.what for each in found}
    assert max(len(each.then) for each in found) < 200
