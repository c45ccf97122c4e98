"""Runs of many seeds in processes of their own, tried with processes that learn nothing, except for one real run."""

import dataclasses
import json
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import ConfigError, RunFailed, TrainConfig
from qfleet.runtime.records import Progress
from qfleet.training import seed_processes
from qfleet.training.seeds import SeedsRun

PROGRESS = Progress(
    env_steps=0, learner_steps=0, train_seconds=0.1, new_env_steps=100, new_learner_steps=10, num_episodes=2,
    episode_return_mean=5.0, episode_length_mean=5.0, q_mean=0.5, loss=0.1, td_error_mean=0.1, exploration=1.0,
)  # fmt: skip

STUB = """
import json, os, pathlib, signal, sys, time
folder, report, begin, template = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
env_steps, seed = int(sys.argv[5]), int(folder.name)
behaviour = json.loads((folder.parent.parent.parent / "behaviour.json").read_text()).get(str(seed), "train")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append("stop"))
signal.signal(signal.SIGUSR1, lambda *_: (record(200), asked.append("stop")))
log = os.open(folder.parent.parent.parent / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
note = lambda what: os.write(log, f"{what} {seed}\\n".encode())

def tell(kind, **content):
    os.write(report, (json.dumps({"kind": kind, **content}) + "\\n").encode())

def record(steps, returns=None):
    with open(folder / "metrics.jsonl", "a") as file:
        values = {"env_steps": steps, "wall_seconds": 1.5, "learner_steps": steps // 10, "num_episodes": 2}
        values |= {"episode_return_mean": 5.0 + seed}
        if returns:
            values |= {"eval_return_mean": sum(returns) / len(returns), "eval_num_cut": 1}
        file.write(json.dumps(values) + "\\n")
    tell("progress", **template | {
        "env_steps": steps, "learner_steps": steps // 10, "eval_returns": returns and [returns],
        "eval_num_different": returns and 2, "eval_num_cut": returns and 1,
    })

def end(stopped, steps, returns=None):
    summary = {"stopped": stopped, "env_steps": steps, "learner_steps": steps // 10, "num_episodes": 4}
    if returns:
        summary |= {"eval_returns": [returns], "eval_num_cut": 1, "eval_num_different": 2, "eval_at_env_steps": steps,
                    "solved_at_env_steps": [steps if stopped == "return reached" else None]}
    (folder / "summary.json").write_text(json.dumps(summary))
    note("end")
    sys.exit(0)

note("begin")
if behaviour == "refuse":
    tell("failed", error="env_steps must be better", is_config=True)
    sys.exit(1)
record(100)
if behaviour == "fail":
    tell("failed", error="the environment broke", is_config=False)
    sys.exit(1)
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "crash":
    print("Traceback ...")
    print("ZeroDivisionError: bad luck", flush=True)
    sys.exit(1)
while behaviour == "wait" and not asked:
    time.sleep(0.02)
    tell("progress", **template | {"env_steps": 100, "learner_steps": 10})
if asked:
    end("interrupted", 100)
record(env_steps, [1.0 + seed, 3.0 + seed])
end("return reached" if behaviour == "solve" else "env steps", env_steps, [1.0 + seed, 3.0 + seed])
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the processes. Call it to say what those of some seeds do: train, wait, fail, refuse, die ..."""
    script = tmp_path / "stub.py"
    script.write_text(textwrap.dedent(STUB))

    def command_of(config: TrainConfig, folder: Path, report_descriptor: int) -> list[str]:
        template = json.dumps(dataclasses.asdict(PROGRESS))
        arguments = [str(folder.absolute()), str(report_descriptor), "", template, str(config.env_steps)]
        return [sys.executable, "-S", "-E", str(script), *arguments]

    def behave(**behaviours: str) -> None:
        names = {name.removeprefix("seed_"): behaviour for name, behaviour in behaviours.items()}
        (tmp_path / "behaviour.json").write_text(json.dumps(names))

    monkeypatch.setattr(seed_processes, "command_of", command_of)
    behave()
    return behave


def make(tmp_path: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "num_seeds": 3, "seed": 4, "env_steps": 400, "eval_period_env_steps": 200, "warmup_env_steps": 32,
        "replay_capacity": 256, "batch_size": 8, "hidden_sizes": (8,), "num_envs": 2, "eval_episodes": 2,
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    return qfleet.make_config("gym:CartPole-v1", "dqn", **defaults | settings)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_run_of_all_seeds_is_a_run_and_each_seed_has_a_run_below_it(tmp_path: Path, stub: Any) -> None:
    run = qfleet.iterate(make(tmp_path), num_seeds_at_once=2)
    assert isinstance(run, SeedsRun)
    assert "seeds 4 to 6, each in a process of its own, 2 at a time, as num_seeds_at_once says" in run.places_in_words
    records = list(run)
    assert read(tmp_path / "run" / "config.json")["config"]["num_seeds"] == 3
    own = [read(tmp_path / "run" / "seeds" / str(seed) / "config.json") for seed in (4, 5, 6)]
    assert [(each["config"]["seed"], each["config"]["num_seeds"]) for each in own] == [(4, 1), (5, 1), (6, 1)]
    summary = read(tmp_path / "run" / "summary.json")
    assert summary == run.summary
    assert (summary["stopped"], summary["env_steps"], summary["learner_steps"]) == ("env steps", 400, 40)
    assert summary["eval_returns"] == [[5.0, 7.0], [6.0, 8.0], [7.0, 9.0]]
    assert (summary["eval_return_mean"], summary["eval_num_different"], summary["eval_num_cut"]) == (7.0, 6, 3)
    assert summary["solved_at_env_steps"] == summary["confirmed_by_new_episodes"] == [None] * 3
    assert (summary["best_eval_at_env_steps"], summary["best_eval_return_mean"]) == (400, 7.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["env_steps"] for line in lines] == [100, 400, 400]
    assert lines[-1]["eval_return_mean"] == 7.0
    assert [lines[-1][f"eval_return_mean_seed_{i}"] for i in range(3)] == [6.0, 7.0, 8.0]
    assert [lines[0][f"episode_return_mean_seed_{i}"] for i in range(3)] == [9.0, 10.0, 11.0]
    assert list((tmp_path / "run").glob("events.out.*"))
    with pytest.raises(ConfigError, match="only once"):
        iter(run)
    steps = [record.env_steps for record in records]
    assert steps == sorted(steps) and steps[-1] == 400, "the mean over seeds"
    assert records[-1].eval_returns is not None and sum(map(len, records[-1].eval_returns)) == 6


def test_no_more_seeds_are_trained_at_once_than_asked_for(tmp_path: Path, stub: Any) -> None:
    qfleet.train(make(tmp_path, num_seeds=5), num_seeds_at_once=2)
    running = most = 0
    lines = (tmp_path / "log").read_text().splitlines()
    for line in lines:
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert len(lines) == 10 and most <= 2


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "seed 5: the environment broke"),
        ("die", "seed 5: its process was killed by SIGKILL"),
        ("crash", "seed 5: its process failed with exit code 1 after it wrote 'ZeroDivisionError: bad luck'"),
    ],
)
def test_a_seed_that_fails_does_not_lose_the_others(tmp_path: Path, stub: Any, behaviour: str, reason: str) -> None:
    stub(seed_5=behaviour)
    with pytest.raises(RunFailed, match=r"1 of 3 seeds failed: .*`qfleet resume \S+` tries these again") as failed:
        qfleet.train(make(tmp_path), num_seeds_at_once=3)
    assert reason in str(failed.value)
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["stopped"] == "failed" and reason in summary["error"]
    assert [seed["stopped"] for seed in summary["seeds"]] == ["env steps", "failed", "env steps"]
    assert summary["eval_returns"] == [[5.0, 7.0], [], [7.0, 9.0]]
    stub()
    again = qfleet.resume(tmp_path / "run")
    assert list(again) and again.summary["stopped"] == "env steps"
    assert (tmp_path / "log").read_text().count("begin 4") == 1, "only the seed that failed goes on"


def test_a_failure_is_exit_code_1_with_the_outcome_of_the_others(
    tmp_path: Path, stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(seed_1="fail")
    flags = ["--num-seeds", "3", "--num-seeds-at-once", "3", "--env-steps", "2000", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "gym:CartPole-v1", "--preset", "dqn", "--warmup-env-steps", "100", *flags]) == 1
    said = capsys.readouterr()
    assert "seeds 0 to 2, each in a process of its own, all at once" in said.out
    assert "  seed 0: 2.0\n  seed 1: not evaluated\n  seed 2: 4.0\n" in said.out
    assert said.err.splitlines()[-1].startswith("qfleet: error: 1 of 3 seeds failed: seed 1: the environment broke. `")
    assert main(["resume", str(tmp_path / "run"), "--checkpoint", "100"]) == 2
    assert "resume the run of one seed, as in `qfleet resume RUN/seeds/0 --checkpoint 100`" in capsys.readouterr().err


def test_a_config_that_no_seed_can_train_leaves_nothing_behind(tmp_path: Path, stub: Any) -> None:
    stub(seed_4="refuse", seed_5="refuse", seed_6="refuse")
    with pytest.raises(ConfigError, match="env_steps must be better"):
        qfleet.train(make(tmp_path), num_seeds_at_once=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["signal", "break"])
def test_a_run_that_is_stopped_stops_all_seeds_and_goes_on_with_those_that_are_not_finished(
    tmp_path: Path, stub: Any, how: str
) -> None:
    stub(seed_5="wait", seed_6="wait")
    run = qfleet.iterate(make(tmp_path, num_seeds=4), num_seeds_at_once=2)
    seen: set[int] = set()
    for _ in run:
        if seen == {4, 5, 6}:
            continue  # a second signal, after a while, would not wait
        seen = {int(path.name) for path in (tmp_path / "run" / "seeds").iterdir() if path.suffix == ""}
        if seen == {4, 5, 6} and how == "signal":
            signal.raise_signal(signal.SIGTERM)
        elif seen == {4, 5, 6}:
            break
    assert seen == {4, 5, 6}, "seed 7 was not begun"
    assert run.summary["stopped"] == "interrupted"
    assert [seed["stopped"] for seed in run.summary["seeds"]] == ["env steps"] + ["interrupted"] * 3
    stub()
    again = qfleet.resume(tmp_path / "run", num_seeds_at_once=3)
    assert isinstance(again, SeedsRun)
    assert "all at once" not in again.places_in_words and "; finished already: 1" in again.places_in_words
    assert list(again) and again.summary["stopped"] == "env steps"
    begun = (tmp_path / "log").read_text().splitlines()
    assert [begun.count(f"begin {seed}") for seed in (4, 7)] == [1, 1]
    assert all(begun.count(f"begin {seed}") >= 1 for seed in (5, 6)), "a process may be stopped before it says so"
    with pytest.raises(ConfigError, match="all seeds of this one have taken as many; give a larger --env-steps"):
        qfleet.resume(tmp_path / "run")
    longer = qfleet.resume(tmp_path / "run", env_steps=800)
    assert list(longer) and longer.summary["env_steps"] == 800


def test_a_seed_that_has_reached_its_return_stays_as_it_is(tmp_path: Path, stub: Any) -> None:
    stub(seed_4="solve", seed_5="solve", seed_6="wait")
    run = qfleet.iterate(make(tmp_path, stop_return=3.0), num_seeds_at_once=2)
    for progress in run:
        if progress.fleet == {"seeds_ready": 1.0}:
            break
    assert run.summary["solved_at_env_steps"] == [400, 400, None]
    stub()
    again = qfleet.resume(tmp_path / "run", env_steps=800)
    assert list(again)
    assert [seed["env_steps"] for seed in again.summary["seeds"]] == [400, 400, 800]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_return_mean" in line][-1]
    assert [last[f"eval_return_mean_seed_{i}"] for i in range(3)] == [6.0, 7.0, 8.0]


def test_a_request_for_a_checkpoint_reaches_the_seeds(tmp_path: Path, stub: Any) -> None:
    """The stubs end when they hear of it."""
    stub(seed_4="wait", seed_5="wait")
    has_asked = False
    for record in qfleet.iterate(make(tmp_path, num_seeds=2), num_seeds_at_once=2):
        if record.env_steps == 100 and not has_asked:
            signal.raise_signal(signal.SIGUSR1)
            has_asked = True
    for seed in ("4", "5"):
        assert '"env_steps": 200' in (tmp_path / "run" / "seeds" / seed / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, {"num_seeds_at_once": 0}, "num_seeds_at_once must be a whole number, at least 1, got 0"),
        ({"num_seeds": 1}, {"num_seeds_at_once": 2}, "num_seeds_at_once must be left out .* with num_seeds=1"),
        ({}, {"network": qfleet.Network(len, len)}, "got network with topology overlapped and num_seeds=3; train one"),
        ({}, {"env": lambda: None}, "is a function of this program; .* or train in this process alone: one seed"),
    ],
)
def test_what_can_not_go_to_other_processes_is_refused_before_anything_is_made(
    tmp_path: Path, settings: dict, given: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        qfleet.train(make(tmp_path, **settings), **given)
    assert list(tmp_path.iterdir()) == []


def test_seeds_stay_where_they_are_trained(tmp_path: Path, stub: Any) -> None:
    qfleet.train(make(tmp_path))
    with pytest.raises(ConfigError, match="got topology fused, which trains them in one program, for a run that"):
        qfleet.resume(tmp_path / "run", topology=qfleet.config.FusedConfig())
    with pytest.raises(ConfigError, match="num_seeds must be 1 where each process is started by hand, got num_seeds=3"):
        qfleet.resume(
            tmp_path / "run", topology=qfleet.config.AllReduceConfig(num_envs=2, coordinator="host:1", process_id=0)
        )


# --- With processes that learn ---


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    qfleet.train(make(folder, num_seeds=2, lock_step=True))
    return folder / "run"


def test_each_seed_learns_what_it_learns_alone(real: Path, tmp_path: Path) -> None:
    summary = read(real / "summary.json")
    alone = qfleet.train(make(tmp_path, num_seeds=1, seed=5, lock_step=True))
    assert summary["eval_returns"][1] == alone["eval_returns"][0]
    expected, first = qfleet.load(tmp_path / "run").params, qfleet.load(real).params
    jax.tree.map(np.testing.assert_array_equal, qfleet.load(real, seed=5).params, expected)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(expected), strict=True))


def test_commands_read_the_run_of_the_seed_that_they_are_given(
    real: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(real.parent)
    real.parent.joinpath("runs").symlink_to(".")
    results = []
    for run in (["latest"], ["runs/ru", "--train-seed", "5"], [str(real / "seeds" / "5")]):
        assert main(["eval", *run, "--episodes", "2", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["run"] == "runs/run", "and not the run of a seed"
    assert results[1]["returns"] == results[2]["returns"]
    assert main(["eval", str(real), "--train-seed", "6"]) == 2
    assert "seed must be one that the run trained, 4 to 5, got 6" in capsys.readouterr().err
