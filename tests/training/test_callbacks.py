"""Callbacks: they are told what happens, what they ask for is done, and one that raises ends the run saved."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import probes
import pytest

import qfleet
from qfleet.config import AgentConfig, ConfigError, RunFailed
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_directory import RunDirectory
from qfleet.topologies.schedule import NOTHING_FIXED, changeable, make_plan
from qfleet.training.callbacks import Callbacks, RunControl, check_callbacks
from qfleet.training.observers import Observers

qfleet.register_env("Corner-v0", probes.observation_action_reward)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def tiny(run_dir: Path, **settings: Any) -> qfleet.TrainConfig:
    defaults: dict[str, Any] = {
        "num_envs": 4,
        "hidden_sizes": (8,),
        "env_steps": 256,
        "eval_period_env_steps": 128,
        "eval_episodes": 5,
        "num_minibatches": 1,
        "rollout_length": 16,
        "checkpoint_best": False,
        "run_dir": str(run_dir),
    }
    return qfleet.make_config("Corner-v0", "pqn", **defaults | settings)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Noting:
    """Notes everything that it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_progress(self, control: RunControl, progress: Any) -> None:
        assert progress.eval_returns is None
        self.seen.append(("progress", progress.env_steps))

    def on_evaluation(self, control: RunControl, progress: Any) -> None:
        assert progress.eval_return_mean is not None
        self.seen.append(("evaluation", progress.env_steps))

    def on_checkpoint(self, control: RunControl, checkpoint: qfleet.SavedCheckpoint) -> None:
        assert (checkpoint.path / "index.json").exists(), "it is whole"
        self.seen.append(("best" if checkpoint.is_best else "checkpoint", checkpoint.env_steps))

    def on_end(self, control: RunControl, summary: Any) -> None:
        self.seen.append((summary["stopped"], summary["env_steps"]))
        self.summary = summary


class Asking:
    """Asks for something once, at the first chunk."""

    def __init__(self, ask: Any) -> None:
        self._ask = ask

    def on_progress(self, control: RunControl, progress: Any) -> None:
        if progress.env_steps == 64:
            self._ask(control)


def test_callbacks_are_told_what_happens(tmp_path: Path) -> None:
    noting = Noting()
    summary = qfleet.train(tiny(tmp_path / "run", checkpoint_best=True, env_steps=128), callbacks=[noting])
    assert noting.seen[:3] == [("progress", 64), ("progress", 128), ("evaluation", 128)]
    assert set(noting.seen[3:5]) == {("checkpoint", 128), ("best", 128)}, "whichever is whole first"
    assert noting.seen[5:] == [("env steps", 128)]
    assert noting.summary == summary


def test_a_callback_may_ask_to_evaluate_to_save_and_to_stop(tmp_path: Path) -> None:
    noting, run_dir = Noting(), tmp_path / "run"

    def ask(control: RunControl) -> None:
        control.evaluate()
        control.save()

    class Stopping:
        def on_evaluation(self, control: RunControl, progress: Any) -> None:
            if progress.env_steps == 128:
                control.stop("it is good enough")

    summary = qfleet.train(tiny(run_dir), callbacks=[Asking(ask), Stopping(), noting])
    assert [step for what, step in noting.seen if what == "evaluation"] == [64, 128]
    assert Checkpoints(run_dir / "checkpoints").all() == [64, 128]
    assert (summary["stopped"], summary["stop_reason"], summary["env_steps"]) == ("callback", "it is good enough", 128)
    assert noting.seen[-1] == ("callback", 128)
    assert [line["env_steps"] for line in records(run_dir) if line["eval_return_mean"] is not None] == [64, 128]
    run = qfleet.resume(run_dir)
    assert [progress.env_steps for progress in run][-1] == 256, "a run that was stopped goes on"
    assert (run.summary["stopped"], run.summary["stop_reason"]) == ("env steps", None)


def test_a_setting_that_a_callback_changes_is_in_the_metrics_and_survives_a_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    qfleet.train(tiny(run_dir, env_steps=128), callbacks=[Asking(lambda control: control.set(exploration=0.25))])
    run = qfleet.resume(run_dir, env_steps=320, callbacks=[Returning()])
    for _ in run:
        pass
    lines = records(run_dir)
    assert [line.get("fixed_exploration") for line in lines] == [None, 0.25, 0.25, None, None]
    assert [line["exploration"] == 0.25 for line in lines] == [False, True, True, False, False]


class Returning:
    def on_progress(self, control: RunControl, progress: Any) -> None:
        control.set(exploration=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e-4}, r"may set what a run decides.*exploration with topology fused.*learning_rate"),
        ({"exploration": 1.5}, r"exploration must be in \[0, 1\], got 1.5"),
        ({"exploration": "low"}, "exploration must be"),
    ],
)
def test_a_change_that_is_impossible_ends_the_run_with_one_clear_error(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunFailed, match=message):
        qfleet.train(tiny(tmp_path / "run"), callbacks=[Asking(lambda control: control.set(**settings))])
    assert Checkpoints(tmp_path / "run" / "checkpoints").all() == [64]


def test_a_callback_that_raises_ends_the_run_saved_and_says_where(tmp_path: Path) -> None:
    noting, run_dir = Noting(), tmp_path / "run"

    class Failing:
        def on_progress(self, control: RunControl, progress: Any) -> None:
            raise ZeroDivisionError("by hand")

        def on_end(self, control: RunControl, summary: Any) -> None:
            raise ValueError("again")

    line = Failing.on_progress.__code__.co_firstlineno + 1
    with pytest.raises(RunFailed, match="by hand") as raised:
        qfleet.train(tiny(run_dir), callbacks=[noting, Failing()])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stopped"] == "failed" and summary["error"] == str(raised.value)
    assert f"the callback Failing.on_progress failed at {__file__}:{line}: ZeroDivisionError" in summary["error"]
    assert Checkpoints(run_dir / "checkpoints").all() == [64]
    assert noting.seen[-1] == ("failed", 64), "a failure is an end, too"


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Noting], "an object with any of the methods"),
        ([object()], "an object with any of the methods"),
        (Noting(), "must be a list"),
        ([type("Typo", (), {"on_eval": print})()], "got on_eval of Typo.*on_evaluation"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_made(tmp_path: Path, callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qfleet.iterate(tiny(tmp_path / "run"), callbacks=callbacks)
    assert not (tmp_path / "run").exists()


def test_processes_that_train_on_their_own_can_only_be_stopped(tmp_path: Path) -> None:
    control = RunControl(tiny(tmp_path), tmp_path, None)
    for ask in (control.save, control.evaluate, lambda: control.set(exploration=0.1)):
        with pytest.raises(ConfigError, match="may only stop"):
            ask()
    Callbacks([Asking(lambda control: control.stop())], control).on_progress(make_progress_at(64))
    assert control.stop_reason


def test_the_last_checkpoint_of_processes_that_train_on_their_own_is_told_before_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDirectory.create(tmp_path / "run", tiny(tmp_path))
    saved = [100]
    checkpoints: Any = SimpleNamespace(latest=lambda: saved[-1], directory=tmp_path)
    told: list[Any] = []

    class Telling:
        def on_checkpoint(self, control: RunControl, checkpoint: qfleet.SavedCheckpoint) -> None:
            told.append(checkpoint.env_steps)
            if checkpoint.env_steps == 300:
                raise OSError("no room")

        def on_end(self, control: RunControl, summary: Any) -> None:
            told.append(summary["stopped"])

    observers = Observers(directory.config, directory, [Telling()], [], resumed_at=100)
    saved.append(200)
    observers.end({"stopped": "env steps"}, checkpoints)
    assert told == [200, "env steps"]
    saved.append(300)
    observers.end({"stopped": "env steps"}, checkpoints)
    assert told[2:] == [300, "env steps"] and "Telling.on_checkpoint failed" in caplog.text


def make_progress_at(env_steps: int) -> Any:
    return type("Progress", (), {"env_steps": env_steps})()


def test_a_plan_keeps_to_what_is_fixed() -> None:
    agent = AgentConfig(replay="prioritised", warmup_env_steps=0, env_steps_per_learner_step=4.0)
    assert changeable(agent) == ("exploration", "importance_exponent", "env_steps_per_learner_step")
    usual = make_plan(agent, 8, 2, 1_000, 0)
    same = make_plan(agent, 8, 2, 1_000, 0, NOTHING_FIXED)
    for one, another in zip(usual, same, strict=True):
        np.testing.assert_array_equal(one, another)
    fixed = {"exploration": 0.5, "importance_exponent": 0.75, "env_steps_per_learner_step": 2.0}
    plan = make_plan(agent, 8, 2, 1_000, 0, fixed)
    assert np.all(plan.exploration == 0.5) and np.all(plan.importance_exponent == 0.75)
    assert (np.sum(usual.num_updates), np.sum(plan.num_updates)) == (64, 128)
    assert changeable(AgentConfig(replay="none")) == ("exploration",)


def test_the_examples_stop_a_run(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("callbacks_example", EXAMPLES / "callbacks.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    check_callbacks([example.EarlyStopping(2), example.TimeLimit(0.0), example.Notify()])
    control, stopping = RunControl(tiny(tmp_path), tmp_path, None), example.EarlyStopping(2)
    for mean in (1.0, 3.0, 2.0):
        stopping.on_evaluation(control, type("Progress", (), {"eval_return_mean": mean})())
    assert control.stop_reason is None
    stopping.on_evaluation(control, type("Progress", (), {"eval_return_mean": 2.5})())
    assert control.stop_reason == "no better for 2 evaluations"
    control = RunControl(tiny(tmp_path), tmp_path, None)
    example.TimeLimit(-1.0).on_progress(control, None)
    assert control.stop_reason == "-1 s are over"
