"""The best checkpoint: what becomes it, that it stays, and that a run can be loaded and resumed from it."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import probes
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import ConfigError, RunFailed
from qfleet.config.checks import check_checkpoint
from qfleet.runtime.best_checkpoint import BestCheckpoint
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.run_directory import RunDirectory
from qfleet.training.outcome import Evaluations

qfleet.register_env("Corner-v0", probes.observation_action_reward)


class ScriptedLanes:
    """Lanes whose episodes of eight steps return what is scripted: one number for each reset."""

    def __init__(self, num_lanes: int, returns: list[float] | None) -> None:
        self._num_lanes, self._returns, self._row, self._reward = num_lanes, returns, 0, 0.0

    def reset(self, seed: int) -> np.ndarray:
        self._row = 0
        self._reward = self._returns.pop(0) / 8 if self._returns is not None else 1.0
        return self._obs()

    def _obs(self) -> np.ndarray:
        return np.zeros((self._num_lanes, 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        self._row += 1

    def recv(self) -> qfleet.HostStep:
        ends, nobody = np.full(self._num_lanes, self._row % 9 == 8), np.zeros(self._num_lanes, bool)
        reward = np.full(self._num_lanes, self._reward, np.float32)
        return qfleet.HostStep(self._obs(), reward, ends, nobody, nobody)

    def close(self) -> None:
        pass


def scripted(*returns: float) -> list[float]:
    """Makes `Scripted-v0` return these numbers, one in each evaluation or confirmation; returns those left."""
    left = list(returns)
    spec = qfleet.EnvSpec(
        name="scripted", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2, time_limit=8
    )
    env = qfleet.HostEnv(spec, lambda n, o: ScriptedLanes(n, None), lambda n, o: ScriptedLanes(n, left))
    qfleet.register_env("Scripted-v0", lambda: env)
    return left


def config_of(run_dir: Path, env: str = "Scripted-v0", preset: str = "pqn", **settings: Any) -> qfleet.TrainConfig:
    defaults: dict[str, Any] = {"num_envs": 4, "hidden_sizes": (8,), "env_steps": 256, "eval_period_env_steps": 64}
    defaults |= {"eval_episodes": 4, "run_dir": str(run_dir)}
    if preset == "pqn":
        defaults |= {"num_minibatches": 1, "rollout_length": 16}
    else:
        defaults |= {"warmup_env_steps": 32, "exploration_env_steps": 200, "env_steps_per_learner_step": 4.0}
    return qfleet.make_config(env, preset, **defaults | settings)


def best_of(run_dir: Path) -> BestCheckpoint:
    return BestCheckpoint(run_dir / "checkpoints", run_id=RunDirectory.open(run_dir).run_id)


def follow(run: Any) -> dict[str, Any]:
    for _ in run:
        pass
    return run.summary


def only_the_first_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluations, "is_better", lambda self, evaluation: self.best is None)


def test_only_what_fresh_episodes_confirm_becomes_the_best(tmp_path: Path) -> None:
    """The second evaluation is lucky, the third no candidate, the fourth better in earnest."""
    left = scripted(80.0, 40.0, 48.0, 32.0, 16.0, 56.0, 64.0)
    summary = qfleet.train(config_of(tmp_path / "run"))
    assert left == [], "only candidates are confirmed"
    assert (summary["best_eval_at_env_steps"], summary["best_eval_return_mean"]) == (256, 64.0)
    assert (summary["best_checkpoint"], summary["newest_checkpoint"]) == (256, 256)
    assert (summary["eval_at_env_steps"], summary["eval_return_mean"]) == (256, 56.0), "the newest is what was played"
    assert best_of(tmp_path / "run").all() == [256]


def test_the_best_stays_while_newer_checkpoints_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, settings = tmp_path / "run", {"checkpoint_period_seconds": 1e-9, "checkpoints_kept": 9}
    scripted(8.0, 8.0, 80.0, 80.0, 1.0, 2.0)
    summary = qfleet.train(config_of(run_dir, **settings))
    assert (summary["best_checkpoint"], summary["newest_checkpoint"]) == (128, 256)
    assert (summary["best_eval_at_env_steps"], summary["best_eval_return_mean"]) == (128, 80.0)
    best, then, now = (qfleet.load(run_dir, checkpoint=number) for number in ("best", 128, 256))
    assert best.label == then.label
    jax.tree.map(np.testing.assert_array_equal, best.params, then.params)
    different = jax.tree.map(lambda a, b: bool(np.any(a != b)), best.params, now.params)
    assert any(jax.tree.leaves(different))
    index = json.loads((run_dir / "checkpoints" / "best" / "128" / "index.json").read_text())
    assert list(index["items"]) == ["learner"], "the replay of each would take up too much"
    scripted(24.0)
    assert main(["eval", str(run_dir), "--checkpoint", "best", "--episodes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["return_mean"] == 24.0


@pytest.mark.parametrize(("env", "preset"), [("Scripted-v0", "double_dqn"), ("Corner-v0", "double_dqn")])
def test_a_run_goes_on_from_its_best_with_an_empty_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, preset: str
) -> None:
    only_the_first_is_best(monkeypatch)
    scripted(*range(20))
    run_dir = tmp_path / "run"
    qfleet.train(config_of(run_dir, env, preset))
    best = qfleet.load(run_dir, checkpoint="best")
    run: Any = qfleet.resume(run_dir, checkpoint="best")
    assert (run._topology.env_steps, run._topology._replay_starts_at) == (64, 64)
    jax.tree.map(np.testing.assert_array_equal, best.params, run._topology.params)
    assert Checkpoints(run_dir / "checkpoints", run_id=None).all() == [64], "so a crash now would go on from there"
    assert (run_dir / "checkpoints" / "256.set-aside").is_dir()
    assert follow(run)["env_steps"] == 256
    assert best_of(run_dir).all() == [64]


def test_the_best_that_is_also_the_newest_is_resumed_whole(tmp_path: Path) -> None:
    scripted(1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0)
    qfleet.train(config_of(tmp_path / "run", preset="double_dqn"))
    scripted(5.0, 5.0)
    run: Any = qfleet.resume(tmp_path / "run", checkpoint="best", env_steps=320)
    assert (run._topology.env_steps, run._topology._replay_starts_at) == (256, 0)
    assert follow(run)["best_checkpoint"] == 320


def test_a_crash_does_not_cost_the_best_and_going_back_by_choice_does(tmp_path: Path) -> None:
    """The process dies after the best evaluation, and before its next checkpoint."""
    run_dir, settings = tmp_path / "run", {"checkpoint_period_seconds": 1e-9, "checkpoints_kept": 9}
    scripted(1.0, 1.0, 9.0, 9.0, 2.0, 2.0)
    qfleet.train(config_of(run_dir, **settings))
    for number in (128, 192, 256):
        shutil.rmtree(run_dir / "checkpoints" / str(number))
    scripted(8.0, 8.0, 8.0, 8.0)
    resumed = follow(qfleet.resume(run_dir))
    assert (resumed["best_checkpoint"], resumed["best_eval_return_mean"]) == (128, 9.0)
    scripted(8.0, 8.0, 7.0, 7.0, 7.0)
    chosen = follow(qfleet.resume(run_dir, checkpoint=64))
    assert (chosen["best_checkpoint"], chosen["best_eval_return_mean"]) == (128, 8.0)


def test_there_is_a_whole_best_at_every_moment_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each renaming and deletion, where a process may be killed."""
    best, seen = BestCheckpoint(tmp_path, run_id=""), set()

    def look() -> None:
        found = BestCheckpoint(tmp_path, run_id="")
        seen.add((found.latest(), found.read_metadata()["return_mean"]))

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            look()
            result = function(*arguments, **keywords)
            look()
            return result

        return call

    with best:
        best.save_learner(10, {"w": np.ones(3)}, {"return_mean": 1.0})
        best.wait()
        monkeypatch.setattr(os, "rename", watched(os.rename))
        monkeypatch.setattr(Path, "rename", watched(Path.rename))
        monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        best.save_learner(5, {"w": np.zeros(3)}, {"return_mean": 2.0})
        best.wait()
        monkeypatch.undo()
    assert seen == {(10, 1.0), (5, 2.0)}, "by return, because resuming may go back to fewer environment steps"
    assert best.all() == [5]


def test_a_run_may_keep_no_best_and_then_confirms_nothing(tmp_path: Path) -> None:
    left = scripted(1.0, 2.0, 3.0, 4.0)
    summary = qfleet.train(config_of(tmp_path / "run", checkpoint_best=False))
    assert left == []
    assert (summary["best_checkpoint"], summary["best_eval_return_mean"]) == (None, 4.0)
    for use in (qfleet.load, qfleet.resume):
        with pytest.raises(ConfigError, match=r"`best` means .* got none in .*best; .*leave --checkpoint out"):
            use(tmp_path / "run", checkpoint="best")
    assert Checkpoints(tmp_path / "run" / "checkpoints", run_id=None).all() == [256], "nothing was set aside"


def test_a_best_that_can_not_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BestCheckpoint, *arguments: Any) -> bool:
        raise OSError("no space left")

    monkeypatch.setattr(BestCheckpoint, "save_learner", fail)
    scripted(1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0)
    summary = qfleet.train(config_of(tmp_path / "run"))
    assert (summary["stopped"], summary["best_checkpoint"]) == ("env steps", None)
    assert [warning for warning in summary["warnings"] if "no space left" in warning]


def test_the_best_is_written_with_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that still improves has a better learner at each evaluation, and writing each would slow it down."""
    written: list[int] = []
    save = BestCheckpoint.save_learner

    def noting(self: BestCheckpoint, env_steps: int, *rest: Any) -> bool:
        written.append(env_steps)
        return save(self, env_steps, *rest)

    monkeypatch.setattr(BestCheckpoint, "save_learner", noting)
    scripted(1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 2.0)
    summary = qfleet.train(config_of(tmp_path / "run"))
    assert written == [192]
    assert (summary["best_checkpoint"], summary["newest_checkpoint"]) == (192, 256)
    best = qfleet.load(tmp_path / "run", checkpoint="best")
    scripted(1.0, 1.0, 2.0, 2.0, 3.0, 3.0)
    qfleet.train(config_of(tmp_path / "short", env_steps=192))
    jax.tree.map(np.testing.assert_array_equal, best.params, qfleet.load(tmp_path / "short").params)


def test_a_best_that_can_not_be_written_now_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, failures = BestCheckpoint.save_learner, [OSError("no space left")]

    def failing_once(self: BestCheckpoint, *arguments: Any) -> bool:
        if failures:
            raise failures.pop()
        return save(self, *arguments)

    monkeypatch.setattr(BestCheckpoint, "save_learner", failing_once)
    scripted(9.0, 9.0, 1.0, 1.0, 1.0)
    summary = qfleet.train(config_of(tmp_path / "run", checkpoint_period_seconds=1e-9))
    assert (summary["best_checkpoint"], summary["newest_checkpoint"]) == (64, 256)
    assert [warning for warning in summary["warnings"] if "the next checkpoint tries again" in warning]


@pytest.mark.parametrize("error", [RuntimeError("broken"), RunFailed("the loss isn't finite", learner_is_sound=False)])
def test_a_run_that_fails_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    scripted(9.0, 9.0, 1.0)
    run = qfleet.iterate(config_of(tmp_path / "run"))
    advance = run._topology.advance

    def failing(goal: int) -> Any:
        if run._topology.env_steps >= 128:
            raise error
        return advance(goal)

    monkeypatch.setattr(run._topology, "advance", failing)
    with pytest.raises(RunFailed):
        follow(run)
    assert run.summary["best_checkpoint"] == 64
    assert run.summary["newest_checkpoint"] == (None if isinstance(error, RunFailed) else 128)


def test_a_damaged_best_is_named_and_the_run_goes_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    scripted(9.0, 9.0, 1.0, 1.0, 1.0)
    qfleet.train(config_of(run_dir))
    (run_dir / "checkpoints" / "best" / "64" / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="as qfleet wrote it.*leave --checkpoint out"):
        qfleet.load(run_dir, checkpoint="best")
    scripted(2.0, 2.0)
    with caplog.at_level(logging.WARNING):
        summary = follow(qfleet.resume(run_dir, env_steps=320))
    assert (summary["best_checkpoint"], summary["best_eval_return_mean"]) == (320, 2.0)
    assert "goes on without its best checkpoint" in caplog.text


@pytest.mark.parametrize("command", ["eval", "watch", "resume"])
def test_a_checkpoint_is_a_number_or_best(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, str(tmp_path), "--checkpoint", "worst"])
    assert "best" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="a whole number or `best`, got 'worst'"):
        check_checkpoint("worst")


def test_what_a_fleet_takes_while_its_best_is_kept_is_reported_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet trains on while it is evaluated, and its learner is then newer than the last record."""
    scripted(*range(1, 9))
    run = qfleet.iterate(config_of(tmp_path))
    kind = type(run._topology)
    learner = kind.learner.fget

    def trained_on(topology: Any) -> Any:
        topology.env_steps = 256  # all steps of the run
        return learner(topology)

    monkeypatch.setattr(kind, "learner", property(trained_on))
    records = list(run)
    assert [record.env_steps for record in records if record.eval_returns] == [64, records[-1].env_steps]
    assert records[-1].env_steps >= 256 and run.summary["eval_at_env_steps"] == records[-1].env_steps
