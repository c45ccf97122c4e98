"""Trials on a real Ray of this machine alone: they train, end, and survive what ends their processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import pytest
from other_processes import lives, wait_until

import qfleet
from qfleet.config import ConfigError, TrainConfig
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.runtime.records import Progress
from qfleet.runtime.run_directory import RunDirectory
from qfleet.sweeps.directory import SweepDirectory
from qfleet.sweeps.pool import Ready
from qfleet.sweeps.records import TrialRecord
from qfleet.sweeps.sweep import open_sweep, reopen_sweep, run_sweep
from qfleet.sweeps.training import SweepView

SPACE = {"num_epochs": "1,2", "learning_rate": "0.001,0.003"}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return qfleet.make_config(
        "CartPole-v1", "pqn", num_envs=4, hidden_sizes=(8,), env_steps=4096, eval_period_env_steps=1024,
        eval_episodes=2, checkpoint_period_seconds=0.01, run_dir=str(tmp_path / "sweep"),
    )  # fmt: skip


def test_what_cannot_be_a_trial_on_ray_is_refused_before_anything_starts(config: TrainConfig) -> None:
    def refused(message: str, config: TrainConfig = config, **settings: object) -> None:
        with pytest.raises(ConfigError, match=message):
            qfleet.sweep(config, {"discount": "0.9,0.99"}, **{"trials_on_ray": "auto", **settings})
        assert not Path(config.run_dir or "").exists()

    fleet = qfleet.make_config("CartPole-v1", "dqn", "actor-learner", run_dir=config.run_dir)
    refused("a learner must be in one process, got topology actor-learner", fleet)
    refused(
        "an environment must have a name that other processes can import", dataclasses.replace(config, env="factory:f")
    )
    refused("trials_on_ray must be auto, local or HOST:PORT, got nowhere", trials_on_ray="nowhere")
    refused("trial_resources must be more than nothing", trial_resources={"CPU": 0})
    refused("trial_resources must come with trials_on_ray", trials_on_ray=None, trial_resources={"CPU": 1})
    refused("loggers must be names", loggers=[object()])


def test_a_cluster_that_is_not_there_is_one_error_and_leaves_no_folder(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def init(**settings: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="trials_on_ray must be the address of a Ray cluster .*, got auto"):
        qfleet.sweep(config, SPACE, trials_on_ray="auto")
    assert not Path(config.run_dir or "").exists()


def test_a_sweep_goes_on_where_it_was_or_where_the_command_says(config: TrainConfig) -> None:
    pytest.importorskip("ray")
    texts, path = {"discount": "0.9,0.99"}, Path(config.run_dir or "")

    def plan_of(directory: SweepDirectory) -> tuple[Any, ...]:
        directory.release()
        return directory.plan.trials_on_ray, dict(directory.plan.trial_resources)

    def opened(**settings: Any) -> tuple[Any, ...]:
        return plan_of(open_sweep(config, texts, 4, prune=True, request="", **settings))

    assert opened() == (None, {})
    expected = ("head:6379", {"CPU": 2, "GPU": 0.5})
    assert opened(trials_on_ray="head:6379", trial_resources=expected[1]) == expected
    with pytest.raises(ConfigError, match="must be trusted, because a cluster runs code: .* names head:6379"):
        reopen_sweep(path, trust=False)
    assert plan_of(reopen_sweep(path, trust=True)) == expected
    assert plan_of(reopen_sweep(path, trust=False, trials_on_ray="head:6379")) == expected
    assert plan_of(reopen_sweep(path, trust=False, trials_on_ray="auto")) == ("auto", expected[1])
    assert plan_of(reopen_sweep(path, trust=False)) == ("auto", expected[1])
    assert opened() == (None, {})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray that the sweep did not start, and must leave as it was."""
    ray = pytest.importorskip("ray")
    from qfleet.topologies.fleet.cluster import connected

    with connected("local", 4, "trials_on_ray"):
        yield
        wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


class Watching(SweepView):
    """Notes how many trials were under way at the same time, and which have ended."""

    def __init__(self) -> None:
        self.num_at_once: list[int] = []
        self.ended: list[int] = []

    def begin_trials(self, trials: Sequence[TrialRecord], config: TrainConfig) -> None:
        self.num_at_once.append(len(trials))

    def end_trial(self, trial: TrialRecord, best: TrialRecord | None) -> None:
        self.ended.append(trial.number)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_trials_on_ray_train_two_at_once(config: TrainConfig) -> None:
    view = Watching()
    directory = open_sweep(config, SPACE, 4, prune=True, request="", trials_at_once=2, trials_on_ray="local")
    result = run_sweep(directory, view=view)
    assert result.is_complete and sorted(view.ended) == [0, 1, 2, 3] and max(view.num_at_once) == 2
    assert len({tuple(trial.settings.items()) for trial in result.trials}) == 4
    for trial in result.trials:
        assert trial.state == "complete"
        summary = RunDirectory.open(result.path / "trials" / f"{trial.number:04}").read_summary() or {}
        assert summary["stopped"] == "env steps" and trial.value == summary["eval_return_mean"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_trial_on_another_node_is_stopped_by_a_signal_that_ray_carries(config: TrainConfig) -> None:
    from qfleet.sweeps.remote import trial_processes

    directory = open_sweep(config, SPACE, 1, prune=True, request="", trials_on_ray="local")
    config = dataclasses.replace(config, run_dir=None, env_steps=10**9)
    directory.journal_path.touch()
    with trial_processes(directory, (), prunes=False) as processes:

        def news() -> Any:
            while not (found := processes.wait(1.0)):
                pass
            return found[0][1]

        process = processes.start()
        assert news() == Ready()
        processes.train(process, 0, config)
        assert news().outcome is None
        processes._send_stop_there(processes._places[process])
        outcome = None
        while outcome is None:
            processes.go_on(process, prune=False)
            outcome = news().outcome
        assert outcome["stopped"] == "interrupted"
    directory.release()


@pytest.fixture
def config_of_seeds(config: TrainConfig) -> TrainConfig:
    """The config of trials whose seeds have processes of their own."""
    return qfleet.make_config(
        "gym:CartPole-v1", "double_dqn", num_seeds=2, num_envs=4, hidden_sizes=(8,), env_steps=16_384,
        eval_period_env_steps=8192, eval_episodes=2, checkpoint_period_seconds=0.01, run_dir=config.run_dir,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", ["config", "config_of_seeds"])
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qfleet.sweeps import remote

    made: list[remote.RayProcesses] = []

    class Known(remote.RayProcesses):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            made.append(self)

    class Killing(Watching):
        """Kills the process of the first trial once each of its runs has a checkpoint."""

        num_chunks = 0

        def progress(self, progress: Progress) -> None:
            self.num_chunks += 1
            if self.num_chunks == 2:
                wait_until(lambda: all(map(checkpoints, runs)))
                (place,) = made[0]._places.values()
                os.kill(place.pid, signal.SIGKILL)
                wait_until(lambda: not lives(place.pid))

    monkeypatch.setattr(remote, "RayProcesses", Known)
    config: TrainConfig = dataclasses.replace(request.getfixturevalue(kind), env_steps=16_384)
    directory = open_sweep(
        config, {"learning_rate": "0.001,0.003"}, 1, prune=True, request="", trials_on_ray="local",
        trial_resources={"CPU": 2},
    )  # fmt: skip
    trial = directory.trial_folder(0)
    runs = [trial / "seeds" / str(seed) for seed in config.seeds] if config.has_seed_processes else [trial]
    result = run_sweep(directory, view=Killing())
    assert [trial.state for trial in result.trials] == ["complete"]
    assert "trial 0 goes on in another process from step" in caplog.text
    for run in runs:
        assert num_starts(run) == 2
        steps = [json.loads(line)["env_steps"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 16_384


def checkpoints(run: Path) -> list[int]:
    """Returns the environment steps of a run's complete checkpoints."""
    return Checkpoints(run / "checkpoints", run_id=None).all()


def num_starts(run: Path) -> int:
    """Returns how often a run has begun or gone on."""
    file = run / "environment.json"
    return len(json.loads(file.read_text())) if file.exists() else 0


@pytest.mark.slow
def test_a_sweep_on_ray_that_is_stopped_or_killed_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "sweep"
    flags = (
        "CartPole-v1 --preset pqn --num-envs 4 --hidden-sizes 8 --env-steps 1e9 --eval-period-env-steps 1e5 "
        "--checkpoint-period-seconds 0.5 --param num_epochs=1,2 --trials 2 --trials-on-ray local --quiet"
    )
    command = [sys.executable, "-m", "qfleet", "sweep", *flags.split(), "--run-dir", str(path)]
    runs = [path / "trials" / name for name in ("0000", "0001")]
    for number, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        before = [num_starts(run) for run in runs]
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})

        def have_begun(process: Any = process, before: list[int] = before) -> bool:
            both = all(num_starts(run) > number and checkpoints(run) for run, number in zip(runs, before, strict=True))
            return process.poll() is not None or both

        wait_until(have_begun)
        process.send_signal(number)
        assert process.wait() == expected
    for run in runs:
        with filelock.FileLock(run.with_name(f".{run.name}.lock"), timeout=10):
            summary = RunDirectory.open(run).read_summary() or {}
        assert summary["stopped"] == "interrupted" and num_starts(run) == 2
        steps = [json.loads(line)["env_steps"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), "it went on where its checkpoint was"
