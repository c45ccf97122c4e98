"""Nothing is lost: whatever ends a run, what is sound is saved, the summary says why, and the run can go on."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import probes
import pytest

import qfleet
from qfleet.config import ConfigError, RunFailed
from qfleet.runtime.checkpoint_files import CheckpointError
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fused.topology import Fused
from qfleet.training.leaving import failure_of_loop

qfleet.register_env("Corner-v0", probes.observation_action_reward)


class Lanes:
    """Lanes of one-dimensional observations, with episodes of eight steps. A row may have a side effect."""

    def __init__(self, num_lanes: int, on_row: Callable[[int], None]) -> None:
        self._num_lanes, self._on_row, self.row = num_lanes, on_row, 0

    def reset(self, seed: int) -> np.ndarray:
        self.row = 0
        return self._obs()

    def _obs(self) -> np.ndarray:
        return np.zeros((self._num_lanes, 1), np.float32)

    def send(self, action: np.ndarray) -> None:
        self.row += 1

    def recv(self) -> qfleet.HostStep:
        self._on_row(self.row)
        ends = np.full(self._num_lanes, self.row % 9 == 8)
        nobody = np.zeros(self._num_lanes, bool)
        return qfleet.HostStep(self._obs(), np.ones(self._num_lanes, np.float32), ends, nobody, nobody)

    def close(self) -> None:
        pass


def nothing(row: int) -> None:
    pass


def register(train: Callable[[int], None] = nothing, evaluate: Callable[[int], None] = nothing) -> str:
    """Registers an environment whose lanes call these functions with each row's number, and returns its name."""
    spec = qfleet.EnvSpec(
        name="lanes", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2, time_limit=8
    )
    env = qfleet.HostEnv(spec, lambda n, options: Lanes(n, train), lambda n, options: Lanes(n, evaluate))
    qfleet.register_env("Lanes-v0", lambda: env)
    return "Lanes-v0"


def tiny(run_dir: Path, env: str = "Corner-v0", preset: str = "pqn", **settings: Any) -> qfleet.TrainConfig:
    defaults: dict[str, Any] = {
        "num_envs": 4,
        "hidden_sizes": (8,),
        "env_steps": 256,
        "eval_period_env_steps": 128,
        "eval_episodes": 5,
        "num_minibatches": 1,
        "rollout_length": 16,
        "run_dir": str(run_dir),
    }
    return qfleet.make_config(env, preset, **defaults | settings)


def test_an_environment_that_changes_the_current_folder_does_not_move_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    env = register(train=lambda row: os.chdir(elsewhere))
    run = qfleet.iterate(tiny(Path("run"), env, env_steps=128))
    assert {p.env_steps for p in run} and run.summary["newest_checkpoint"] == run.summary["env_steps"]
    assert not any(elsewhere.iterdir()) and str(run.directory.path) == "run"


def follow(run: Any) -> dict[str, Any]:
    for _ in run:
        pass
    return run.summary


def summary_of(run_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def checkpoints(run_dir: Path) -> list[int]:
    return Checkpoints(run_dir / "checkpoints").all()


def raising(error: BaseException, at: int) -> Callable[[int], None]:
    def on_row(row: int) -> None:
        if row == at:
            raise error

    return on_row


def signalling(number: signal.Signals, at: int) -> Callable[[int], None]:
    def on_row(row: int) -> None:
        if row == at:
            signal.raise_signal(number)

    return on_row


@pytest.mark.parametrize(
    "error", [ValueError("not this shape"), MemoryError("no more"), SystemExit("goodbye"), KeyboardInterrupt("by hand")]
)
def test_whatever_leaves_the_loop_is_noted_and_what_was_learned_is_saved(tmp_path: Path, error: BaseException) -> None:
    """The first evaluation raises, after 128 environment steps."""
    env = register(evaluate=raising(error, at=3))
    is_passed_on = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if is_passed_on else RunFailed, match=str(error)):
        qfleet.train(tiny(tmp_path / "run", env))
    assert checkpoints(tmp_path / "run") == [128]
    summary = summary_of(tmp_path / "run")
    assert (summary["stopped"], summary["env_steps"]) == ("failed", 128)
    assert str(error) in summary["error"] and type(error).__name__ in summary["error"]
    if isinstance(error, ValueError):  # what is saved is the same whatever the error
        register()
        assert follow(qfleet.resume(tmp_path / "run"))["stopped"] == "env steps"


def test_a_run_that_its_environments_end_says_how_many_failed(tmp_path: Path) -> None:
    error = RunFailed("environments may fail at most 2 times", learner_is_sound=True, num_env_failures=3)
    with pytest.raises(RunFailed, match="at most 2 times"):
        qfleet.train(tiny(tmp_path / "run", register(train=raising(error, at=20))))
    assert summary_of(tmp_path / "run")["num_env_failures"] == 3
    assert checkpoints(tmp_path / "run") == [64]


def test_an_environment_that_can_be_made_only_once_is_found_before_training(tmp_path: Path) -> None:
    spec = qfleet.EnvSpec(
        name="robot", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2, time_limit=8
    )

    def no_more(num_lanes: int, options: Any) -> Lanes:
        raise RuntimeError("the port is taken")

    qfleet.register_env("Robot-v0", lambda: qfleet.HostEnv(spec, lambda n, options: Lanes(n, nothing), no_more))
    with pytest.raises(ConfigError, match="made several times.*robot.*the port is taken"):
        qfleet.iterate(tiny(tmp_path / "run", "Robot-v0"))
    assert not (tmp_path / "run").exists(), "nothing has come of it"


def raising_itself(run: Any) -> None:
    for _ in run:
        raise ZeroDivisionError


def raising_deeper(run: Any) -> None:
    for progress in run:
        json.loads(f"no JSON {progress}")


def raising_in_a_block(run: Any) -> None:
    with contextlib.suppress(ValueError):
        for _ in run:
            int("x")


def raising_through_a_finally(run: Any) -> None:
    for _ in run:
        try:
            raise ZeroDivisionError
        finally:
            json.dumps(None)


def raising_again(run: Any) -> None:
    for _ in run:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            json.dumps(None)
            raise


def passed_on(run: Any) -> Iterator[Any]:
    yield from enumerate(progress for progress in run)


def raising_behind_another_generator(run: Any) -> None:
    for _ in passed_on(run):
        raise ZeroDivisionError


def leaving(run: Any) -> None:
    for _ in run:
        break


def leaving_by_return(run: Any) -> int:
    for progress in run:
        return int(progress.env_steps)
    return 0


def leaving_behind_another_generator(run: Any) -> None:
    for _ in passed_on(run):
        break


def leaving_after_an_exception(run: Any) -> list[Exception]:
    kept: list[Exception] = []
    for _ in run:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError as error:
            kept.append(error)
            break
    return kept


def closing(run: Any) -> None:
    iterator = iter(run)
    next(iterator)
    iterator.close()


FAILING = (
    raising_itself,
    raising_deeper,
    raising_in_a_block,
    raising_through_a_finally,
    raising_again,
    raising_behind_another_generator,
)


@pytest.mark.parametrize(
    "loop",
    [*FAILING, leaving, leaving_by_return, leaving_behind_another_generator, leaving_after_an_exception, closing],
    ids=lambda loop: loop.__name__,
)
def test_an_exception_that_leaves_the_loop_over_a_run_is_told_from_a_break(loop: Callable[[Any], Any]) -> None:
    found: list[str] = []

    class Iterated:
        def __iter__(self) -> Iterator[Any]:
            try:
                while True:
                    yield SimpleNamespace(env_steps=0)
            except GeneratorExit:
                found.append(failure_of_loop())

    with contextlib.suppress(ZeroDivisionError, ValueError):
        loop(Iterated())
    (failure,) = found
    wanted = f"an exception has left the loop over the run, at {__file__}:" if loop in FAILING else ""
    assert failure.startswith(wanted) and bool(failure) == bool(wanted)


def test_a_run_whose_loop_fails_is_saved_and_says_so(tmp_path: Path) -> None:
    run = qfleet.iterate(tiny(tmp_path / "run"))
    with pytest.raises(ZeroDivisionError):
        raising_itself(run)
    assert summary_of(tmp_path / "run") == run.summary
    line = raising_itself.__code__.co_firstlineno + 2
    assert (run.summary["stopped"], run.summary["env_steps"]) == ("failed", 64)
    assert run.summary["error"] == f"an exception has left the loop over the run, at {__file__}:{line}"
    assert checkpoints(tmp_path / "run") == [64]
    resumed = follow(qfleet.resume(tmp_path / "run"))
    assert resumed["stopped"] == "env steps" and "error" not in resumed


def test_a_signal_during_training_ends_train_after_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="qfleet resume"):
        qfleet.train(tiny(tmp_path / "run", register(train=signalling(signal.SIGHUP, at=3))))
    assert checkpoints(tmp_path / "run") == [64]
    assert summary_of(tmp_path / "run")["stopped"] == "interrupted"


def test_a_signal_during_an_evaluation_is_heard_at_once_and_the_evaluation_made_up_for(tmp_path: Path) -> None:
    rows: list[int] = []

    def on_row(row: int) -> None:
        rows.append(row)
        signalling(signal.SIGINT, at=4)(row)

    summary = follow(qfleet.iterate(tiny(tmp_path / "run", register(evaluate=on_row), env_steps=128)))
    assert rows == [1, 2, 3, 4], "the rest of the episodes isn't waited for"
    assert (summary["stopped"], summary["env_steps"], summary["eval_returns"]) == ("interrupted", 128, None)
    register()
    resumed = follow(qfleet.resume(tmp_path / "run"))
    assert (resumed["stopped"], resumed["env_steps"], resumed["eval_return_mean"]) == ("env steps", 128, 8.0)


def test_a_signal_during_compilation_stops_the_run_and_it_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Fused, "start", lambda self: signal.raise_signal(signal.SIGTERM))
        run = qfleet.iterate(tiny(tmp_path / "run"))
    assert list(run) == []
    assert (run.summary["stopped"], run.summary["env_steps"]) == ("interrupted", 0)
    assert summary_of(tmp_path / "run")["stopped"] == "interrupted"
    assert follow(qfleet.resume(tmp_path / "run"))["env_steps"] == 256


def test_a_signal_may_ask_for_a_checkpoint_alone(tmp_path: Path) -> None:
    """SIGUSR1 arrives in the first chunk, of 64 environment steps."""
    config = tiny(tmp_path / "run", register(train=signalling(signal.SIGUSR1, at=3)), checkpoints_kept=9)
    assert qfleet.train(config)["stopped"] == "env steps"
    assert checkpoints(tmp_path / "run") == [64, 256]


@pytest.mark.parametrize("kind", [OSError, CheckpointError])
def test_a_disk_that_is_full_for_a_while_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    save, attempts = Checkpoints.save, []

    def failing_at_first(self: Checkpoints, *arguments: Any) -> None:
        attempts.append(arguments[0])
        if len(attempts) == 1:
            raise kind("a checkpoint must be writable, got no space left")
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", failing_at_first)
    config = tiny(tmp_path / "run", checkpoint_period_seconds=1e-9, eval_period_env_steps=64, checkpoint_best=False)
    summary = qfleet.train(config)
    assert attempts == [64, 128, 192, 256]
    assert checkpoints(tmp_path / "run") == [128, 192, 256]
    assert summary["stopped"] == "env steps"
    assert any("no space left" in warning for warning in summary["warnings"])


def test_a_run_whose_last_checkpoint_can_not_be_written_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Checkpoints, *arguments: Any) -> None:
        raise OSError("a checkpoint must be writable, got no space left")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(RunFailed, match="no space left"):
        qfleet.train(tiny(tmp_path / "run"))
    assert summary_of(tmp_path / "run")["stopped"] == "failed"


def test_a_run_that_has_reached_its_return_goes_on_when_resumed(tmp_path: Path) -> None:
    """Each episode pays 8, so the first evaluation reaches any lower return."""
    first = qfleet.train(tiny(tmp_path / "run", register(), stop_return=5.0))
    assert (first["stopped"], first["env_steps"]) == ("return reached", 128)
    second = follow(qfleet.resume(tmp_path / "run", env_steps=256))
    assert (second["stopped"], second["env_steps"]) == ("env steps", 256)
    assert (second["solved_at_env_steps"], second["eval_return_mean"]) == ([128], 8.0)
    third = follow(qfleet.resume(tmp_path / "run", env_steps=1024, stop_return=7.0))
    assert (third["stopped"], third["env_steps"]) == ("return reached", 384), "another return is another goal"


def test_an_evaluation_that_was_had_is_never_lost_from_the_summary(tmp_path: Path) -> None:
    before = qfleet.train(tiny(tmp_path / "run"))
    run = qfleet.resume(tmp_path / "run", env_steps=1024)
    for _ in run:
        break
    assert run.summary["env_steps"] == 320
    for name in ("eval_returns", "eval_return_mean", "eval_at_env_steps"):
        assert run.summary[name] == before[name] is not None


def test_rows_that_only_begin_an_episode_are_told_apart(tmp_path: Path) -> None:
    summary = qfleet.train(tiny(tmp_path / "run", register()))
    assert summary["num_episodes"] == 28, "64 rows of 4 lanes, 9 rows for an episode of 8 steps"
    assert summary["env_steps_between_episodes"] == 28
