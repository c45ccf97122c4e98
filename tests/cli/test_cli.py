"""The command line: exit codes, one clear error and no traceback, and what it prints."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import probes
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.cli.show import environments
from qfleet.cli.train_command import parse
from qfleet.config import ActorLearnerConfig, FusedConfig, OverlappedConfig
from qfleet.core.keys import Stream, key_of
from qfleet.presets import make_config
from qfleet.runtime import evaluation
from qfleet.topologies.fused.topology import Fused

TINY = ["--num-envs", "4", "--hidden-sizes", "8", "--num-minibatches", "1", "--eval-episodes", "5"]
SCRIPT = str(Path(sys.executable).with_name("qfleet"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "CartPole-v1", *TINY, "--env-steps", "256", "--run-dir", str(path), "--quiet"]) == 0
    return path


def exit_code(arguments: list[str]) -> int:
    """Returns the exit code that the process would have; tyro exits by itself on flags that it can't read."""
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean train"),
        (["train"], "required"),
        (["train", "CartPol-v1"], "Did you mean CartPole-v1"),
        (["train", "CartPole-v1", "--preset", "pqnn"], "Did you mean pqn"),
        (["train", "CartPole-v1", "--num-env", "4"], "--num-envs"),
        (["train", "CartPole-v1", "--num-envs", "0"], "num_envs must be"),
        (["train", "CartPole-v1", "--num-envs", "1000000000000"], "at most 2147483647"),
        (["train", "CartPole-v1", "--env-steps", "-1"], "env_steps must be"),
        (["train", "CartPole-v1", "--profile"], "profile must come with topology overlapped, got topology fused"),
        (["train", "--profile", "CartPole-v1"], "jax.profiler.trace"),
        (["train", "CartPole-v1", "--max-failures=3"], "max_failures must come with topology overlapped"),
        (["train", "CartPole-v1", "--preset", "dqn", "--replay-capacity", "9"], "replay_capacity must hold"),
        (["train", "CartPole-v1", "--optimiser", "adamm"], "Did you mean adam"),
        (["train", "CartPole-v1", "--stop-return", "nan"], "must be finite"),
        (["train", "gymnax:Pendulum-v1"], "actions must be discrete"),
        (["train", "no_such_module:X"], "can be imported"),
        (["eval", "no-such-run"], "a run is a folder with a config.json"),
        (["eval", "no-such-run", "--episodes", "0"], "episodes must be"),
        (
            ["eval", "no-such-run", "--episodes", "18446744073709551616"],
            "episodes must be a whole number, at most 1000000",
        ),
        (["watch", "no-such-run"], "a run is a folder with a config.json"),
        (["resume", "no-such-run"], "a run is a folder with a config.json"),
        (["check-env", "CartPol-v1"], "Did you mean CartPole-v1"),
        (["check-env", "CartPole-v1", "--steps", "0"], "steps must be a whole number, at least 1"),
        (["devices", "CartPol-v1"], "Did you mean CartPole-v1"),
        (["devices", "--mesh.data", "2"], "Missing from qfleet devices"),
        (["devices", "CartPole-v1", "--mesh.model", "1024"], "at most the number of devices"),
        (["devices", "CartPole-v1", "--mesh.data", "3"], "num_envs must divide over mesh.data"),
        (["check-env", "CartPole-v1", "--num-env-workers", "-1"], "num_env_workers must be a whole number, at least 0"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_error_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments == ["train", "gymnax:Pendulum-v1"]:
        pytest.importorskip("gymnax")
    if arguments[0] == "watch":
        pytest.importorskip("av")
    assert exit_code(arguments) == 2
    captured = capsys.readouterr()
    words = " ".join((captured.err + captured.out).replace("│", " ").split())
    assert message in words
    assert "Traceback" not in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (
            ["CartPole-v1"],
            "CartPole-v1 (in-graph) with pqn (chosen because this preset is tuned for CartPole-v1), into",
        ),
        (
            ["FrozenLake-v1", "--num-env-workers", "1"],
            "FrozenLake-v1 (gymnasium, 4 in 1 worker process) with double_dqn (chosen because the environment shows",
        ),
        (["CartPole-v1", "--preset", "pqn"], "CartPole-v1 (in-graph) with pqn, into"),
    ],
)
def test_a_run_says_where_its_environments_step(
    arguments: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, *TINY, "--env-steps", "64", "--run-dir", str(tmp_path / "run")]) == 0
    assert place in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["backend"] in place


@pytest.mark.parametrize(
    ("backend", "topology", "place"),
    [
        ("in-graph", FusedConfig(), "in-graph"),
        ("gymnax", FusedConfig(), "gymnax, in-graph"),
        ("gymnasium", OverlappedConfig(), "gymnasium, 8 in this process"),
        ("gymnasium", OverlappedConfig(num_env_workers=2), "gymnasium, 8 in 2 worker processes"),
        ("ale", OverlappedConfig(num_envs=4), "ale, 4 on its own threads"),
        ("registered", OverlappedConfig(), "registered, 8 at once"),
    ],
)
def test_each_backend_has_its_place(backend: str, topology: FusedConfig | OverlappedConfig, place: str) -> None:
    assert environments(backend, topology) == place


def test_a_run_directory_that_exists_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "config.json").read_bytes()
    assert main(["train", "CartPole-v1", *TINY, "--run-dir", str(run_dir)]) == 2
    assert "qfleet resume" in capsys.readouterr().err
    assert (run_dir / "config.json").read_bytes() == before


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "no-such-run", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_eval_prints_json_that_any_parser_reads(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_dir), "--episodes", "7", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["env"], result["episodes"], len(result["returns"])) == ("CartPole-v1", 7, 7)
    assert result["return_min"] <= result["return_mean"] <= result["return_max"]
    assert (result["different_episodes"], result["cut_episodes"]) == (7, 0)
    assert (result["episode_limit"], result["exploration"]) == (500, 0.0)


def test_eval_plays_as_it_is_told_and_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_dir), "--episodes", "5", "--exploration", "0.5", "--max-episode-steps", "3"]) == 0
    said = capsys.readouterr()
    assert "mean greedy return 3.0 over 5 episodes with 50% random actions, all different, 5 of 5 cut at 3" in said.out
    assert said.err == ""  # progress is for terminals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--episodes", "0"], "episodes must be a whole number, at least 1, got 0"),
        (["--episodes", str(2**64)], "episodes must be a whole number, at most 1000000"),
        (["--seed", "-1"], "seed must be a whole number, at least 0, got -1"),
        (["--exploration", "1"], "exploration must be at least 0 and below 1, got 1"),
        (["--max-episode-steps", "0"], "max_episode_steps must be a whole number, at least 1, got 0"),
        (["--num-env-workers", "-1"], "num_env_workers must be a whole number, at least 0, got -1"),
    ],
)
def test_eval_refuses_what_it_can_not_play(
    run_dir: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run_dir), *flags]) == 2
    assert message in capsys.readouterr().err


def test_eval_shows_in_a_terminal_how_far_it_is(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "FIRST_PIECE_STEPS", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["eval", str(run_dir), "--episodes", "5", "--json"]) == 0
    said = capsys.readouterr()
    assert "evaluating 0 of 5" in said.err and said.err.endswith("\r\x1b[K")
    assert len(json.loads(said.out)["returns"]) == 5


def test_watch_writes_the_episodes_that_eval_counts(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av")
    assert main(["eval", str(run_dir), "--episodes", "2", "--seed", "3", "--json"]) == 0
    returns = json.loads(capsys.readouterr().out)["returns"]
    assert main(["watch", str(run_dir), "--episodes", "2", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for i, expected in enumerate(returns):
        title, mp4, gif = (line.strip() for line in lines[3 * i : 3 * i + 3])
        assert title == f"episode {i}: return {expected:.1f} in {expected:.0f} steps"
        stem = run_dir / "videos" / f"step256-seed3-episode{i}"
        assert (mp4, gif) == (f"{stem}.mp4", f"{stem}.gif") and Path(gif).stat().st_size > 0
        with av.open(mp4) as container:
            assert sum(1 for _ in container.decode(video=0)) == expected + 1
    assert len(lines) == 6


def test_a_video_that_can_not_be_written_is_told_with_the_remedy(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")

    def fail(*arguments: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("qfleet.policy.film", fail)
    assert main(["watch", str(run_dir), "--out", str(tmp_path)]) == 1
    assert f"got {tmp_path} (Read-only file system); free space" in capsys.readouterr().err


def test_watch_in_python_plays_a_plain_greedy_loop(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    (video,) = qfleet.watch(run_dir, checkpoint=256, seed=4, out_dir=tmp_path / "out")
    policy, env = qfleet.load(run_dir), qfleet.make_env("CartPole-v1")
    reset_key, step_key = jax.random.split(key_of(4, Stream.POLICY))
    state, obs = env.reset(jax.random.split(reset_key, 1)[0])
    total, terminated = 0.0, False
    while not terminated and total < env.spec.time_limit:
        result = env.step(state, policy(obs[None])[0], step_key)
        state, obs, terminated = result.state, result.observation, bool(result.terminated)
        total += float(result.reward)
    assert (video.episode_return, video.episode_steps) == (total, total)
    assert video.mp4 == tmp_path / "out" / "step256-seed4-episode0.mp4"


@pytest.mark.parametrize("module", ["av", "PIL"])
def test_a_missing_extra_names_the_command_that_adds_it(
    module: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["watch", str(run_dir)]) == 2
    assert "pip install 'qfleet[video]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--episodes", "0", "episodes must be a whole number, at least 1, got 0"),
        ("--seed", "-1", "seed must be a whole number, at least 0, got -1"),
        ("--frames-per-second", "0", "frames_per_second must be a whole number, at least 1, got 0"),
        ("--checkpoint", "7", "256"),
        ("--out", "config.json/videos", "videos need a folder that can be made"),
        ("--train-seed", "9", "seed must be one that the run trained"),
    ],
)
def test_watch_refuses_bad_flags(
    flag: str,
    value: str,
    message: str,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(run_dir)
    assert main(["watch", str(run_dir), flag, value]) == 2
    assert message in capsys.readouterr().err


def test_a_truncated_checkpoint_is_named_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert main(["train", "CartPole-v1", *TINY, "--env-steps", "64", "--run-dir", str(path), "--quiet"]) == 0
    files = [file for file in (path / "checkpoints" / "64" / "learner").rglob("*") if file.is_file()]
    victim = max(files, key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    for command in (["eval", str(path)], ["resume", str(path), "--env-steps", "128"]):
        assert main(command) == 2
        assert "a checkpoint must be as qfleet wrote it" in capsys.readouterr().err


def test_a_failed_run_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qfleet.register_env("NaN-v1", lambda: probes.nan_reward(at_step=20))
    assert main(["train", "NaN-v1", *TINY, "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "in lane 0" in error and "Traceback" not in error


def test_a_run_that_does_not_fit_into_memory_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(self: Fused) -> float:
        raise RuntimeError("INTERNAL: Out of memory allocating 32000000000 bytes.")

    monkeypatch.setattr(Fused, "start", start)
    assert main(["train", "CartPole-v1", "--run-dir", str(tmp_path / "run")]) == 2
    assert "must fit into memory" in capsys.readouterr().err


def test_tuned_settings_apply_wherever_the_environment_stands() -> None:
    first = parse(["CartPole-v1", "--preset", "pqn"])
    last = parse(["--seed", "0", "--preset=pqn", "CartPole-v1"])
    assert first.config == last.config == make_config("CartPole-v1", "pqn")
    assert parse(["CartPole-v1", "--learning-rate", "0.5"]).config.agent.learning_rate == 0.5


def test_presets_and_environments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == main(["envs"]) == main(["--version"]) == main([]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("rainbow_lite", "CartPole-v1", "gymnax:Breakout-MinAtar", "usage:"))


def test_help_does_not_wait_for_jax() -> None:
    code = (
        "import sys; from qfleet.cli.main import main; main(['--help']); main(['presets']); main(['envs']); "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


MODULE = """
import jax.numpy as jnp
import numpy as np
from qfleet import EnvSpec, InGraphEnv, StepResult, register_env

spec = EnvSpec(name="One-v0", observation_shape=(1,), observation_dtype=np.dtype("float32"), num_actions=2)

def step(state, action, key):
    return StepResult(state, jnp.zeros(1), jnp.float32(1), jnp.bool_(True), jnp.bool_(False))

register_env("One-v0", lambda: InGraphEnv(spec, lambda key: (jnp.int32(0), jnp.zeros(1)), step))
"""


def test_a_signal_ends_a_run_of_ones_own_module_cleanly_and_it_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    command = [SCRIPT, "train", "mine:One-v0", *TINY, "--env-steps", "1000000000", "--run-dir", "run"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        try:
            while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped"] == "interrupted"
    resumed = subprocess.run(
        [SCRIPT, "resume", "run", "--trust", "--env-steps", str(summary["env_steps"] + 64), "--quiet"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["env_steps"] > summary["env_steps"]


def test_a_profiled_run_prints_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    pqn = ["--preset", "pqn", *TINY]
    arguments = ["train", "gym:CartPole-v1", *pqn, "--env-steps", "256", "--run-dir", str(run), "--profile"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = json.loads((run / "summary.json").read_text())["time_shares"]
    assert sum(shares.values()) == pytest.approx(1)
    start = next(i for i, line in enumerate(lines) if line.split() == ["part", "ms/row", "share"])
    rows = [line.split() for line in lines[start + 1 :]]
    assert [(name, share) for name, _, share in rows] == [(name, f"{share:.1%}") for name, share in shares.items()]
    assert list(shares) == ["environment", "transfer", "inference", "returns", "update", "other"]


def test_flags_set_the_ray_resources_of_a_fleets_processes() -> None:
    resources = ["--learner-resources", "GPU", "1", "CPU", "2", "--actor-resources", "CPU", "0.5", "actor", "1"]
    topology = parse(["CartPole-v1", "--preset", "ape_x", *resources]).config.topology
    assert isinstance(topology, ActorLearnerConfig)
    assert topology.learner_resources == {"GPU": 1, "CPU": 2}
    assert topology.actor_resources == {"CPU": 0.5, "actor": 1}


def test_a_current_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && exec {sys.executable} -m qfleet envs"
    found = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "qfleet: error: the current folder must exist, and it was deleted; change to another one\n"


def test_the_names_of_a_suite_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnax")
    assert main(["envs", "gymnax"]) == 0
    assert "gymnax:Breakout-MinAtar" in capsys.readouterr().out.splitlines()
