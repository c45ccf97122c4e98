"""The folder of a run: it returns what was written, refuses folders that aren't runs, and overwrites nothing."""

import dataclasses
import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig, ConfigError, FusedConfig, TrainConfig
from qfleet.config.encoding import SCHEMA_VERSION
from qfleet.runtime.run_directory import RunDirectory, strict_json
from qfleet.runtime.run_files import UnusableFile, parse_json

CONFIG = TrainConfig(
    env="CartPole-v1",
    preset="pqn",
    agent=AgentConfig(
        hidden_sizes=(64, 32), optimiser_options={"eps": 1e-5}, max_gradient_norm=None, replay="none", discount=1
    ),
    topology=FusedConfig(num_envs=8),
    seed=7,
    stop_return=475.0,
)


def test_files_stay_where_they_were_meant_when_the_current_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    named, unnamed = RunDirectory.create("run", CONFIG), RunDirectory.create(None, CONFIG, tmp_path)
    monkeypatch.chdir(elsewhere)
    late = RunDirectory.create("late", CONFIG, tmp_path)
    for run in (named, unnamed, late):
        run.write_summary({"stopped": "env steps"})
        run.lock().release()
        assert not run.path.is_absolute() and run.folder == tmp_path / run.path
        assert run.as_named(run.report_path) == run.path / "report.html"
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.open("late").read_summary() == RunDirectory.open(unnamed.path).read_summary()
    assert not any(elsewhere.iterdir())


def test_a_limit_on_open_files_that_no_run_can_live_with_is_told_before_the_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    run = RunDirectory.create(tmp_path / "before", CONFIG)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 20))
    for use in (lambda: RunDirectory.create(tmp_path / "run", CONFIG), run.lock):
        with pytest.raises(ConfigError, match="open 128 files at once, got a limit of 20; .* `ulimit -n 1024`"):
            use()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.lock().release()


def test_the_configuration_comes_back_as_it_went_in(tmp_path: Path) -> None:
    created = RunDirectory.create(tmp_path / "a" / "run", CONFIG)
    opened = RunDirectory.open(tmp_path / "a" / "run")
    assert opened == created
    assert opened.config == CONFIG
    assert isinstance(opened.config.agent.hidden_sizes, tuple)


def test_the_default_name_tells_what_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(CONFIG, env="gym:../Weird env/v0")
    first, second = RunDirectory.create(None, config), RunDirectory.create(None, config)
    assert first.path.parent == second.path.parent == Path("runs")
    assert first.path.name.startswith("gym-..-Weird-env-v0-pqn-7-20")
    assert first.path != second.path
    assert RunDirectory.open(first.path).config == RunDirectory.open(second.path).config == config


def test_each_run_has_an_id_of_its_own_and_older_ones_have_none(tmp_path: Path) -> None:
    first, second = (RunDirectory.create(tmp_path / name, CONFIG) for name in ("first", "second"))
    assert RunDirectory.open(first.path).run_id == first.run_id != second.run_id
    content = json.loads(first.config_path.read_text())
    del content["run_id"]
    first.config_path.write_text(json.dumps({**content, "schema_version": 2}))
    older = RunDirectory.open(first.path)
    assert (older.run_id, older.schema_version, second.schema_version) == ("", 2, SCHEMA_VERSION)


def test_a_lock_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match="its lock a regular file, got .*lock"):
        run.lock()


def test_an_empty_folder_is_fine_for_a_new_run(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path, CONFIG).config_path.exists()


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=f"got {tmp_path}, which holds files .*--run-dir.*qfleet resume {tmp_path}"):
        RunDirectory.create(tmp_path, dataclasses.replace(CONFIG, seed=8))
    assert (tmp_path / "config.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="must be a folder that can be made, got .*--run-dir"):
            RunDirectory.create(path, CONFIG)


def test_a_configuration_that_json_cannot_hold_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finite"):
        RunDirectory.create(tmp_path / "run", dataclasses.replace(CONFIG, stop_return=float("inf")))
    assert not (tmp_path / "run").exists()


def change(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        content = content[parent]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("config.agent.discount", 2.0, "discount must be in"),
        ("config.agent.discount", "0.9", "discount must be a number, got '0.9'"),
        ("config.agent.double", 1, "double must be True or False, got 1"),
        ("config.agent.loss", "hinge", "loss must be one of squared, huber, got 'hinge'"),
        ("config.agent.hidden_sizes", [64, "x"], r"hidden_sizes\[1\] must be a whole number, got 'x'"),
        ("config.agent.hidden_sizes", 64, "hidden_sizes must be a tuple"),
        ("config.agent.optimiser_options", {"eps": float("nan")}, "NaN is no number in JSON"),
        ("config.agent.optimiser_options", [], "optimiser_options must be a mapping"),
        ("config.stop_return", "high", "stop_return must be a number, or None, got 'high'"),
        ("config.seed", True, "seed must be a whole number, got True"),
        ("config.topology", None, "config.topology must have a name"),
        ("config.agent.colour", "red", r"config.agent must have .*missing \[\], unknown \['colour'\]"),
        ("config.env", ..., r"config must have .*missing \['env'\], unknown \[\]"),
        ("qfleet_version", ..., "must hold qfleet_version and config"),
        ("run_id", ..., "run_id must be 16 hexadecimal digits, got None"),
        ("run_id", "../x", "run_id must be 16 hexadecimal digits, got '../x'"),
        ("schema_version", 1.5, "schema_version must be 1 to"),
    ],
)
def test_a_changed_config_file_is_an_error_that_names_the_field(
    tmp_path: Path, path: str, value: Any, words: str
) -> None:
    file = RunDirectory.create(tmp_path, CONFIG).config_path
    content = json.loads(file.read_text())
    change(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words) as raised:
        RunDirectory.open(tmp_path)
    assert str(file) in str(raised.value) and "restore the file from a copy" in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "[]", "null"])
def test_a_config_file_that_is_broken_or_foreign_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json must"):
        RunDirectory.open(tmp_path)


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder with a config\.json, got .*No such file"):
        RunDirectory.open(tmp_path / "absent")


def test_the_summary_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    assert run.read_summary() is None
    run.write_summary({"eval_return_mean": np.float32(1.5), "eval_returns": jnp.arange(2), "peak": float("nan")})
    assert run.read_summary() == {"eval_return_mean": 1.5, "eval_returns": [0, 1], "peak": None}

    def fail(*_: object) -> None:
        raise OSError("the machine stopped here")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", fail)
        run.write_summary({"half": 1})
    assert run.read_summary() == {"eval_return_mean": 1.5, "eval_returns": [0, 1], "peak": None}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_summary_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    run = RunDirectory.create(tmp_path, CONFIG)
    run.summary_path.write_text(text)
    with pytest.raises(ConfigError, match=f"got {run.summary_path}.*delete it"):
        run.read_summary()


def test_strict_json_has_no_numbers_that_parsers_reject() -> None:
    value = {"a": [float("inf"), -1.0, (np.nan, None)], 3: np.float64(2), "b": np.bool_(True)}
    assert json.loads(strict_json(value), parse_constant=pytest.fail) == {
        "a": [None, -1.0, [None, None]],
        "3": 2.0,
        "b": True,
    }


def claim(barrier: Any, results: Any, folder: str, path: str | None) -> None:
    """Tries to make a run's folder at the same moment as others; a process of its own calls this."""
    os.chdir(folder)
    barrier.wait()
    try:
        results.put(str(RunDirectory.create(path, CONFIG).path))
    except ConfigError as error:
        results.put(f"refused: {error}")


@pytest.mark.parametrize("path", [None, "given"])
def test_processes_that_begin_at_the_same_moment_never_share_a_folder(tmp_path: Path, path: str | None) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=claim, args=(barrier, results, str(tmp_path), path)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = [results.get() for _ in processes]
    for process in processes:
        process.join()
    if path is None:
        assert len(set(paths)) == 4
        assert all(RunDirectory.open(tmp_path / each).config == CONFIG for each in paths)
    else:
        assert paths.count("given") == 1
        assert sum("absent or empty" in each for each in paths) == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_that_came_to_nothing_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, stays in (("new", False), ("mine", True), ("used", True)):
        run = RunDirectory.create(tmp_path / name, CONFIG)
        if name == "used":
            run.metrics_path.touch()
        run.discard()
        assert run.path.exists() == stays
        assert run.config_path.exists() == (name == "used")


def test_nothing_is_left_of_a_run_whose_config_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "mine").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for name in ("new", "mine"):
            with pytest.raises(ConfigError, match=f"{name} .No space left"):
                RunDirectory.create(tmp_path / name, CONFIG)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"], "the next try would find the folder taken"


def test_a_folder_of_other_files_is_not_taken_for_a_run_to_resume(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="give another --run-dir$"):
        RunDirectory.create(tmp_path, CONFIG)


def test_a_command_in_an_error_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "my runs"
    RunDirectory.create(path, CONFIG)
    with pytest.raises(ConfigError, match=f"`qfleet resume '{path}'`"):
        RunDirectory.create(path, CONFIG)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1e999]", "1e999 is too large a number"), ("[" * 101 + "]" * 101, "it is nested too deeply")],
)
def test_json_that_could_not_be_handled_or_written_again_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UnusableFile, match=reason):
        parse_json(text.encode())
    assert parse_json(b"[" * 100 + b"]" * 100)


def test_a_folder_whose_name_checkpoints_cannot_have_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"r\xff")
    for use in (lambda: RunDirectory.create(path, CONFIG), lambda: RunDirectory.open(path)):
        with pytest.raises(ConfigError, match=r"must be UTF-8, got '.*r\\udcff'; .*PYTHONUTF8=1"):
            use()
    assert not path.exists()
