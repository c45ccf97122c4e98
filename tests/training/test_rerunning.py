"""Training a run again: what differs since then, and whether the result is the same."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run

import qfleet
from qfleet.cli.main import main
from qfleet.config import (
    AgentConfig,
    AllReduceConfig,
    ConfigError,
    FusedConfig,
    GossipConfig,
    OverlappedConfig,
)
from qfleet.doctor.check import Check
from qfleet.runtime.environment_record import describe_process
from qfleet.runtime.run_directory import RunDirectory
from qfleet.training import rerunning
from qfleet.training.rerunning import Comparison, compare, config_to_rerun, what_differs
from qfleet.training.resuming import check_address_trusted

SETTINGS = {
    "num_envs": 4, "hidden_sizes": (8,), "env_steps": 256, "eval_period_env_steps": 128, "eval_episodes": 5,
    "report": False,
}  # fmt: skip


def train(path: Path, **settings: Any) -> RunDirectory:
    qfleet.train(qfleet.make_config("CartPole-v1", "pqn", run_dir=path, **{**SETTINGS, **settings}))
    return RunDirectory.open(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The folder of a run that has ended. No test may change it."""
    return train(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def changed(run: RunDirectory, tmp_path: Path) -> Callable[..., RunDirectory]:
    """Copies the run with another content of a file; None deletes it."""

    def change(file: str, **content: Any) -> RunDirectory:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run.path, folder)
        path = folder / file
        if content:
            path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
        else:
            path.unlink()
        return RunDirectory.open(folder)

    return change


def test_a_run_that_is_trained_again_is_the_same_bit_for_bit(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = {"platform": "cpu", "kind": "cpu", "count": 1, "memory_bytes": None}
    monkeypatch.setattr(rerunning, "examine", lambda _: [Check("devices", "good", "one", facts={"devices": [device]})])
    monkeypatch.setenv("XLA_OF_NOW", "1")
    assert main(["rerun", str(run.path), "--run-dir", str(tmp_path / "again")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"what differs from when {run.path} was started:", "  XLA_OF_NOW: none -> 1"]
    assert lines[-1].startswith("the result is the same: mean return ")
    assert lines[-1].endswith("parameters the same bit for bit")
    again = RunDirectory.open(tmp_path / "again")
    assert again.config == rerunning.dataclasses.replace(run.config, run_dir=str(tmp_path / "again"))
    assert again.run_id != run.run_id


def test_another_result_is_said_with_what_is_different(
    run: RunDirectory, changed: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    found = compare(run, changed("summary.json", eval_return_mean=1.25))
    assert found.is_same is False and "mean return 1.2, and " in found.words and "bit for bit" in found.words
    found = compare(run, train(tmp_path / "other", learning_rate=0.1))
    assert found.is_same is False and "the result is different" in found.words
    assert "parameters different, by " in found.words


def test_results_that_cannot_be_compared_are_not(
    run: RunDirectory, changed: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    longer = changed("summary.json", env_steps=999, stopped="interrupted")
    assert "ended after 999 environment steps (interrupted), and this one after 256" in compare(longer, run).words
    assert "the earlier run has not come to an end" in compare(changed("summary.json"), run).words
    damaged = changed("checkpoints/256/index.json")
    bare = make_run(tmp_path / "bare", env_steps=256)
    bare.directory.write_summary({**(run.read_summary() or {})})
    for other in (longer, damaged, bare.directory):
        found = compare(other, run)
        assert found.is_same is None and found.words.startswith("the results can't be compared: ")
    assert not rerunning._has_own_network(damaged)


def test_only_what_can_be_made_from_the_folder_is_trained_again(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(name: str, env: str = "CartPole-v1", **settings: Any) -> RunDirectory:
        config = qfleet.TrainConfig(env=env, **settings)
        return RunDirectory.create(tmp_path / name, config)

    by_hand = AllReduceConfig(num_processes=2, coordinator="host:1", process_id=0)
    for refused, message in (
        (of("factory", "factory:make"), "got factory:make, a function that only the program which began"),
        (of("by hand", topology=by_hand), "were each started by hand; .* --process-id"),
        (of("module", "mazes:Maze-v0"), "must be trusted before it is imported.* mazes:Maze-v0.* give --trust"),
        (of("head", agent=AgentConfig(head="os:abort")), "must be trusted before it is imported.* head os:abort"),
        (of("cluster", topology=GossipConfig(ray_address="head:6379")), "because a cluster runs code: .* head:6379"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_to_rerun(refused, None, trust=False)
    assert config_to_rerun(RunDirectory.open(tmp_path / "head"), "x", trust=True).run_dir == "x"
    assert config_to_rerun(run, None, trust=False).run_dir is None
    monkeypatch.setattr(rerunning, "read_metadata", lambda *_: {"has_own_network": True})
    with pytest.raises(ConfigError, match="which was trained with one that a program gave"):
        config_to_rerun(run, None, trust=False)


def test_a_cluster_that_only_the_folder_names_is_not_joined(tmp_path: Path) -> None:
    config = qfleet.TrainConfig(env="CartPole-v1", topology=GossipConfig(ray_address="head:6379"))
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="cluster runs code: .*run names head:6379; if it is yours, give --ray-addr"):
        qfleet.resume(directory.path)
    other = dataclasses.replace(config, topology=GossipConfig(ray_address="another:6379"))
    for now, given, trust in ((config, "head:6379", False), (config, None, True), (other, None, False)):
        check_address_trusted(directory, now, given, trust=trust)


def test_what_differs_is_told_of_the_process_that_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    gpu = {"platform": "gpu", "kind": "H100", "count": 2, "memory_bytes": 1}

    def examine(names: list[str]) -> list[Check]:
        asked.append(names)
        return [Check("devices", "good", "a GPU", facts={"devices": [gpu]})]

    monkeypatch.setattr(rerunning, "examine", examine)

    def found(name: str, **settings: Any) -> set[str]:
        saved = make_run(tmp_path / name, **settings)
        assert what_differs(saved.directory) is None
        then = {**describe_process(), "num_cores": 999, "devices": {"platform": "cpu", "kind": "cpu", "count": 1}}
        saved.directory.environment_path.write_text(json.dumps([then, {"python": "2"}]))
        return {each.what for each in what_differs(saved.directory) or ()}

    devices = {"device platform", "device kind", "device count"}
    assert found("fused") == {"num cores", *devices}
    assert found("seeds", topology=OverlappedConfig(), num_seeds=2) == found("all", topology=AllReduceConfig())
    assert found("peers", topology=AllReduceConfig()) == devices
    assert len(asked) == 4
    assert found("ray", topology=GossipConfig()) == {"num cores"} and len(asked) == 4


@pytest.mark.parametrize(
    ("topology", "replay", "expected"),
    [
        (FusedConfig(), "uniform", True),
        (OverlappedConfig(), "uniform", False),
        (OverlappedConfig(), "none", True),
        (OverlappedConfig(lock_step=True), "uniform", True),
        (GossipConfig(lock_step=True), "uniform", False),
    ],
)
def test_a_topology_knows_whether_a_seed_decides_its_result(topology: Any, replay: Any, expected: bool) -> None:
    assert topology.is_repeatable(AgentConfig(replay=replay)) is expected


def test_a_different_result_is_a_failure_where_the_seed_decides_it(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rerunning, "compare", lambda *_: Comparison(False, "the result is different: so it is"))
    monkeypatch.setattr(rerunning, "what_differs", lambda _: None)
    monkeypatch.setattr("qfleet.api.iterate", lambda *_, **__: make_run(tmp_path / str(len(list(tmp_path.iterdir())))))
    monkeypatch.setattr("qfleet.cli.rerun_command.follow", lambda start, **_: start())
    assert main(["rerun", str(run.path)]) == 1
    assert "has no environment.json" in capsys.readouterr().out
    other = make_run(tmp_path / "run", topology=OverlappedConfig())
    assert main(["rerun", str(other.path), "--quiet"]) == 0
    assert capsys.readouterr().out == (
        "the result is different: so it is\nthey need not be the same: in topology overlapped, as it is set, timing "
        "decides too\n"
    )
