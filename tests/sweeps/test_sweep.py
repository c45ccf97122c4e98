"""Sweeps as a whole. Most of them have trials that are made up; one is real, and killed on the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from other_processes import wait_until

import qfleet
from qfleet.cli.main import main
from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.config.encoding import decode
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.runtime.signals import StopFlag
from qfleet.sweeps import sweep as sweeps
from qfleet.sweeps import training
from qfleet.sweeps.batch import batches, train_batch
from qfleet.sweeps.directory import SweepDirectory, SweepPlan
from qfleet.sweeps.records import TrialRecord
from qfleet.sweeps.space import read_space
from qfleet.sweeps.study import Study
from qfleet.sweeps.trial import ENDS, PRUNED, Pruning, checkpoints_of, outcome_of
from qfleet.training.assembly import make_parts_of_trials
from qfleet.training.callbacks import RunControl

PARAMS = {"learning_rate": "1e-4..1e-2:log", "num_epochs": [1, 2]}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return qfleet.make_config("CartPole-v1", preset="pqn", run_dir=str(tmp_path / "sweep"))


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the trials that were trained. Their result is a hundred learning rates."""
    trained: list[int] = []

    def train_trial(directory: SweepDirectory, number: int, config: TrainConfig, **_: Any) -> dict[str, Any]:
        trained.append(number)
        return {"stopped": "env steps", "eval_return_mean": 100 * config.agent.learning_rate}

    monkeypatch.setattr(training, "train_trial", train_trial)
    return trained


def fail_with(error: Callable[[int], BaseException | None]) -> Callable[..., dict[str, Any]]:
    def train_trial(directory: SweepDirectory, number: int, *_: Any, **__: Any) -> dict[str, Any]:
        directory.trial_folder(number).mkdir(parents=True)
        if failure := error(number):
            raise failure
        return {"stopped": "callback" if number == 3 else "env steps", "eval_return_mean": float(number)}

    return train_trial


def test_a_sweep_finds_the_best_settings_and_writes_them_down(config: TrainConfig, numbers: list[int]) -> None:
    result = qfleet.sweep(config, PARAMS, trials_at_once=1, trials=6)
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert result.best is not None and result.best == result.trials[0] and result.config is not None
    assert result.best.value == max(trial.value or 0 for trial in result.trials)
    assert result.config.agent.learning_rate == result.best.settings["learning_rate"]
    best = json.loads((result.path / "best.json").read_text())
    assert best.pop("schema_version") and decode(best) == result.config
    page = (result.path / "sweep.html").read_text()
    assert "parallel" in page and "PED-ANOVA" in page


def test_the_same_call_goes_on_and_trains_no_trial_twice(config: TrainConfig, numbers: list[int]) -> None:
    qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2)
    assert len(qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2).trials) == 2
    assert len(qfleet.sweep(config, PARAMS, trials_at_once=1, trials=4).trials) == 4
    assert numbers == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="goes on with the settings that it began with"):
        qfleet.sweep(config, {**PARAMS, "num_epochs": [1, 3]}, trials_at_once=1)
    with pytest.raises(ConfigError, match="needs an absent or empty folder"):
        (Path(config.run_dir or "") / "sweep.json").unlink()
        qfleet.sweep(config, PARAMS, trials_at_once=1)


def test_a_sweep_whose_journal_is_gone_is_left_as_it_is(config: TrainConfig, numbers: list[int]) -> None:
    path = qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2).path
    (path / "trials" / "0000").mkdir(parents=True)
    before = (path / "best.json").read_bytes()
    for spoil in (lambda: (path / "journal.log").write_text(""), (path / "journal.log").unlink):
        spoil()
        with pytest.raises(ConfigError, match=r"must have its journal.log, got .* missing or empty; restore"):
            qfleet.sweep(config, PARAMS, trials_at_once=1, trials=3)
        assert main(["sweep", "--resume", str(path)]) == 2
    assert (path / "best.json").read_bytes() == before and len(numbers) == 2


def test_failures_are_noted_and_the_sweep_goes_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {1: RunFailed("no memory"), 2: ConfigError("sizes don't divide")}
    monkeypatch.setattr(training, "train_trial", fail_with(errors.get))
    result = qfleet.sweep(config, PARAMS, trials_at_once=1, trials=5)
    assert [(trial.number, trial.state) for trial in result.trials] == [
        (4, "complete"), (0, "complete"), (3, "pruned"), (1, "failed"), (2, "failed"),
    ]  # fmt: skip
    assert result.trials[3].error == "no memory"


def test_a_sweep_ends_if_nothing_but_failures_comes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "train_trial", fail_with(lambda _: RunFailed("no memory")))
    with pytest.raises(
        RunFailed, match="all 3 trials of the sweep that have ended have failed: no memory. They aren't"
    ):
        qfleet.sweep(config, PARAMS, trials_at_once=1)


def test_a_sweep_without_any_result_has_failed_and_so_has_what_goes_on_with_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "train_trial", fail_with(lambda _: RunFailed("no memory")))
    for _ in range(2):  # the second time, there is nothing left to train
        with pytest.raises(RunFailed, match=r"all 2 trials .* failed: no memory.*--resume .* --trials 5` tries others"):
            qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2)
    assert main(["sweep", "--resume", str(config.run_dir)]) == 1
    assert "all 2 trials of the sweep" in capsys.readouterr().err


def test_a_sweep_that_is_refused_leaves_no_folder(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("the environment can't be made")

    monkeypatch.setattr(training, "train_trial", refuse)
    with pytest.raises(ConfigError, match="can't be made"):
        qfleet.sweep(config, PARAMS, trials_at_once=1)
    assert not Path(config.run_dir or "").exists()


def test_a_folder_is_worked_in_by_one_process_at_a_time(config: TrainConfig, numbers: list[int]) -> None:
    qfleet.sweep(config, PARAMS, trials_at_once=1, trials=1)
    holder = sweeps.reopen_sweep(Path(config.run_dir or ""), trust=False)
    with pytest.raises(ConfigError, match="a sweep is run by one process at a time"):
        qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2)
    holder.release()
    assert len(qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2).trials) == 2


def test_an_interrupted_trial_is_taken_up_again(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = iter(["env steps", "interrupted", "env steps"])
    trained = []

    def train_trial(directory: SweepDirectory, number: int, config: TrainConfig, **_: Any) -> dict[str, Any]:
        trained.append((number, config.agent.learning_rate))
        return {"stopped": next(stopped), "eval_return_mean": 1.0}

    monkeypatch.setattr(training, "train_trial", train_trial)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2)
    qfleet.sweep(config, PARAMS, trials_at_once=1, trials=2)
    assert [number for number, _ in trained] == [0, 1, 1] and trained[1] == trained[2]


def test_returns_to_stop_at_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="stop_return must be left out of a sweep"):
        qfleet.sweep(qfleet.make_config("CartPole-v1", stop_return=475), PARAMS)
    with pytest.raises(ConfigError, match="trials must be"):
        qfleet.sweep(config, PARAMS, trials_at_once=1, trials=0)
    assert not Path(config.run_dir or "").exists()


@pytest.mark.parametrize(("env_steps", "reports", "stops"), [(2048, [(2, 3.0)], True), (4096, [], False)])
def test_every_evaluation_but_the_last_one_may_stop_a_trial(
    tmp_path: Path, env_steps: int, reports: list[tuple[int, float]], stops: bool
) -> None:
    config = TrainConfig(env="CartPole-v1", env_steps=4096, eval_period_env_steps=1024)
    control, heard = RunControl(config, tmp_path, None), []

    def report(number: int, mean: float) -> bool:
        heard.append((number, mean))
        return True

    progress: Any = types.SimpleNamespace(env_steps=env_steps, eval_return_mean=3.0)
    Pruning(report).on_evaluation(control, progress)
    assert heard == reports and control.stop_reason == (PRUNED if stops else None)


TINY = (
    "CartPole-v1 --preset pqn --num-envs 4 --hidden-sizes 8 --env-steps 4096 --eval-period-env-steps 256 "
    "--eval-episodes 2 --checkpoint-period-seconds 0.01 --param learning_rate=1e-4..1e-2:log --trials 2 --seeds 2 "
    "--trials-at-once 1"
)


def test_a_sweep_that_is_killed_goes_on_with_the_trial_that_was_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep"
    arguments = ["sweep", *TINY.split(), "--run-dir", str(path)]
    command = [sys.executable, "-m", "qfleet", *arguments, "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    checkpoints = path / "trials" / "0001" / "checkpoints"
    wait_until(lambda: process.poll() is not None or any(name.name.isdigit() for name in checkpoints.glob("*")))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = (path / "trials" / "0000" / "summary.json").read_bytes()
    assert main(["sweep", "--resume", str(path)]) == 0
    output = capsys.readouterr().out
    assert "2 trials of 4,096 environment steps, of which 1 have ended" in output
    assert "trial 1 (learning_rate=" in output and "trial 0 (" not in output
    assert (path / "trials" / "0000" / "summary.json").read_bytes() == first
    assert sorted(each.name for each in (path / "trials").iterdir()) == ["0000", "0001"]
    starts = json.loads((path / "trials" / "0001" / "environment.json").read_text())
    assert len(starts) == 2  # so it went on from its checkpoint
    assert main(arguments) == 0  # the same command, with nothing left to do
    again = capsys.readouterr().out
    assert "of which 2 have ended" in again and f"next: qfleet train --config {path}/best.json --seed 2" in again
    assert main(["train", "--config", str(path / "best.json"), "--print-config"]) == 0
    assert "num_seeds = 2" in capsys.readouterr().out
    ended = RunDirectory.open(path / "trials" / "0001")
    value = outcome_of(ended)["eval_return_mean"]
    ended.summary_path.unlink()  # as if killed between the last checkpoint and the summary
    assert outcome_of(ended) == {**outcome_of(ended), "stopped": "env steps", "eval_return_mean": value}


BATCH = (
    "CartPole-v1 --preset pqn --num-envs 4 --hidden-sizes 8 --env-steps 4096 --eval-period-env-steps 1024 "
    "--eval-episodes 2 --checkpoint-period-seconds 0.05 --param learning_rate=1e-4..1e-2:log "
    "--param num_epochs=1,2 --param discount=0.9,0.99 --trials 8 --trials-at-once 4 --no-prune"
)


def ended(path: Path) -> dict[str, bytes]:
    """Returns the summaries of the trials that have come to their end, by name."""
    found = {each.parent.name: each.read_bytes() for each in path.glob("trials/*/summary.json")}
    return {name: content for name, content in found.items() if json.loads(content)["stopped"] in ENDS}


def records_of(path: Path) -> list[TrialRecord]:
    directory = SweepDirectory.open(path)
    directory.release()
    space = read_space(directory.plan.config, directory.plan.params)
    return Study(directory.journal_path, space, seed=0, num_evaluations=4).records


def test_a_batch_that_is_killed_again_and_again_loses_no_trial_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep"
    arguments = ["sweep", *BATCH.split(), "--run-dir", str(path)]
    command = [sys.executable, "-m", "qfleet", *arguments, "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before: dict[str, bytes] = {}
    for num_files in (1, 5):  # checkpoints, whenever there are more of them than before
        process = subprocess.Popen(command, cwd=tmp_path, env=environment)
        count = len(list(path.glob("trials/*/checkpoints/*/index.json"))) + num_files
        wait_until(
            lambda count=count, process=process: (
                process.poll() is not None or len(list(path.glob("trials/*/checkpoints/*/index.json"))) >= count
            )
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = ended(path)
        assert before.items() <= now.items()
        before = now
    assert main(arguments) == 0
    assert "8 trials of 4,096 environment steps" in capsys.readouterr().out
    now = ended(path)
    assert before.items() <= now.items() and sorted(now) == [f"{i:04}" for i in range(8)]
    records = records_of(path)
    assert [record.state for record in records] == ["complete"] * 8
    for record in records:
        run = RunDirectory.open(path / "trials" / f"{record.number:04}")
        assert record.value == outcome_of(run)["eval_return_mean"]
        assert run.config.agent.learning_rate == record.settings["learning_rate"]
        lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
        steps = [line["env_steps"] for line in lines]
        assert steps == sorted(set(steps)) and steps[-1] == 4096
        assert qfleet.load(run.folder).evaluate(num_episodes=1)


def test_a_trial_of_a_batch_ends_as_it_does_alone(tmp_path: Path) -> None:
    config = qfleet.make_config(
        "CartPole-v1", preset="pqn", num_envs=4, hidden_sizes=(8,), env_steps=4096, eval_period_env_steps=1024,
        eval_episodes=5, run_dir=str(tmp_path / "sweep"),
    )  # fmt: skip
    result = qfleet.sweep(config, {"learning_rate": [1e-3, 3e-3, 1e-2]}, trials=3)
    assert result.config is not None and result.best is not None
    again = qfleet.train(dataclasses.replace(result.config, run_dir=str(tmp_path / "alone"), report=False))
    summary = json.loads((result.path / "trials" / f"{result.best.number:04}" / "summary.json").read_text())
    assert again["eval_return_mean"] == pytest.approx(result.best.value, rel=0.05)
    assert again.keys() == summary.keys()
    for name in ("env_steps", "learner_steps", "eval_at_env_steps", "topology", "num_seeds", "stopped"):
        assert again[name] == summary[name]


def begin_batch(path: Path) -> tuple[SweepDirectory, dict[int, TrainConfig]]:
    """Returns the folder of a sweep, and the configs of three trials that one program can train."""
    config = qfleet.make_config(
        "CartPole-v1", preset="pqn", num_envs=4, hidden_sizes=(8,), env_steps=2048, eval_period_env_steps=512,
        eval_episodes=2,
    )  # fmt: skip
    directory = SweepDirectory.create_or_open(path, SweepPlan(config, {"discount": "0.9,0.99"}, 3, True, ""))
    agents = [dataclasses.replace(config.agent, discount=value) for value in (0.9, 0.95, 0.99)]
    return directory, {i: dataclasses.replace(config, agent=agent) for i, agent in enumerate(agents)}


def train_to_ends(
    directory: SweepDirectory, configs: dict[int, TrainConfig], prunings: dict[int, Pruning]
) -> list[tuple[int, Any]]:
    """Trains a batch, and returns its ends in their order: the number of the trial, and its summary."""
    ends: list[tuple[int, Any]] = []
    parts = dict(zip(configs, make_parts_of_trials(list(configs.values())), strict=True))
    with StopFlag() as stop:
        train_batch(
            directory, configs, parts, prunings=prunings, loggers=(), on_progress=lambda _: None,
            on_end=lambda *each: ends.append(each), stop=stop,
        )  # fmt: skip
    return ends


def test_a_pruned_trial_of_a_batch_ends_early_and_the_others_go_on(tmp_path: Path) -> None:
    directory, configs = begin_batch(tmp_path / "sweep")
    prunings = {i: Pruning(lambda step, _, i=i: i == 1 and step == 2) for i in configs}
    ends = train_to_ends(directory, configs, prunings)
    directory.release()
    assert [number for number, _ in ends] == [1, 0, 2]
    assert [summary["stopped"] for _, summary in ends] == ["callback", "env steps", "env steps"]
    assert [summary["env_steps"] for _, summary in ends] == [1024, 2048, 2048]


def evaluations_of(directory: SweepDirectory, number: int) -> dict[int, float]:
    """Returns the mean returns of a trial's evaluations by their environment steps."""
    lines = RunDirectory.open(directory.trial_folder(number)).metrics_path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    evaluated = [record for record in records if record.get("eval_return_mean") is not None]
    return {record["env_steps"]: record["eval_return_mean"] for record in evaluated}


def test_a_batch_that_is_stopped_between_evaluations_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """The signal comes when one trial has been evaluated. The others are evaluated before any of them trains on."""

    class Stop(Pruning):
        def on_evaluation(self, control: RunControl, progress: Progress) -> None:
            if Path(control.path).name == "0000":
                os.kill(os.getpid(), signal.SIGTERM)

    directory, configs = begin_batch(tmp_path / "stopped")
    ends = train_to_ends(directory, configs, {i: Stop(lambda step, mean: False) for i in configs})
    assert [summary["stopped"] for _, summary in ends] == ["interrupted"] * 3
    assert [checkpoints_of(directory, i) for i in configs] == [[512]] * 3
    assert [len(evaluations_of(directory, i)) for i in configs] == [1, 0, 0]
    assert batches(directory, configs) == [[0, 1, 2]]
    ends = train_to_ends(directory, configs, {})
    whole, _ = begin_batch(tmp_path / "whole")
    expected = train_to_ends(whole, configs, {})
    assert [summary["stopped"] for _, summary in ends] == ["env steps"] * 3
    for i in configs:
        assert evaluations_of(directory, i) == evaluations_of(whole, i)
        assert ends[i][1]["eval_returns"] == expected[i][1]["eval_returns"]
    directory.release()
    whole.release()
