"""A run's policy in a folder: what loads it again, what refuses to, and what the hub is shown."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import ConfigError, RunFailed
from qfleet.exporting import hub
from qfleet.exporting.record import Origin, read_exported
from qfleet.runtime.evaluation import EvaluationOptions
from qfleet.runtime.run_directory import RunDirectory

TINY = ["--num-envs", "4", "--hidden-sizes", "8", "--num-minibatches", "1", "--eval-episodes", "5", "--no-report"]
OBSERVATIONS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    flags = [*TINY, "--env-steps", "256", "--num-seeds", "2", "--seed", "5", "--run-dir", str(path), "--quiet"]
    assert main(["train", "CartPole-v1", *flags]) == 0
    return path


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    assert main(["export", str(run_dir), "--train-seed", "6"]) == 0
    return run_dir / "exports" / "step256-trained6-safetensors"


@pytest.fixture
def own_copy(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change(folder: Path, **policy: Any) -> None:
    """Changes entries of `policy` in config.json, and of `config` if their names have a dot."""
    content = json.loads((folder / "config.json").read_text())
    for name, value in policy.items():
        place, _, inner = name.partition("__")
        if inner:
            content["config"][place][inner] = value
        elif name in content["config"]:
            content["config"][name] = value
        else:
            content["policy"][name] = value
    (folder / "config.json").write_text(json.dumps(content))


def test_an_exported_policy_acts_and_plays_as_the_runs_own(run_dir: Path, exported: Path) -> None:
    ours, theirs = qfleet.load(run_dir, seed=6), qfleet.load(exported)
    assert ours.label == theirs.label == "step256-trained6" and ours.options == theirs.options
    assert np.array_equal(ours.q_values(OBSERVATIONS), theirs.q_values(OBSERVATIONS))
    assert np.array_equal(ours.evaluate(3), theirs.evaluate(3))
    text = (exported / "config.json").read_text()
    assert str(run_dir) not in text, "the folder's path is nobody's business"
    assert json.loads(text)["config"]["seed"] == 6


def test_commands_take_an_exported_policy(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(exported), "--episodes", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["returns"]) == 3
    assert main(["export", str(exported), "--format", "stablehlo", "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "exported CartPole-v1, step256-trained6:",
        f"  {tmp_path / 'again' / 'config.json'}",
        f"  {tmp_path / 'again' / 'model.stablehlo'}",
    ]
    assert main(["resume", str(exported)]) == 2
    assert "a run is wanted here, got" in (said := capsys.readouterr().err) and "an exported policy" in said


def test_watch_films_an_exported_policy_into_its_folder(own_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    assert main(["watch", str(own_copy)]) == 0
    assert (own_copy / "videos" / "step256-trained6-seed0-episode0.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "."], "an export needs an absent or empty folder, got ., which is there already; move it away"),
        (["--out", "config.json"], "an export needs an absent or empty folder"),
        (["--out", "config.json/x"], "an export needs a folder that can be made"),
        (["--out", "a\0b"], "an export needs a folder that can be made"),
        (["--checkpoint", "7"], "256"),
        (["--checkpoint", "best", "--train-seed", "9"], "seed must be one that the run trained"),
        (["--episodes", "3"], "--episodes must come with --hub-folder, which evaluates, got 3 without"),
        (["--hub-folder", "--episodes", "0"], "episodes must be a whole number, at least 1, got 0"),
        (["--hub-folder", "--format", "onnx"], "--hub-folder must have format safetensors"),
    ],
)
def test_bad_input_is_one_clear_error(
    flags: list[str],
    message: str,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run_dir)
    before = sorted(path.name for path in run_dir.iterdir())
    assert main(["export", str(run_dir), *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_an_unknown_format_and_a_missing_extra_are_told_before_any_work(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = qfleet.load(exported)
    with pytest.raises(ConfigError, match="format must be one of safetensors, stablehlo, onnx, got torch"):
        policy.export(tmp_path / "out", "torch")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setattr("qfleet.api.load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["export", str(exported), "--format", "onnx"]) == 2
    assert "pip install 'qfleet[onnx]'" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory.create(tmp_path / "run", qfleet.TrainConfig(env="CartPole-v1"))
    assert main(["export", str(tmp_path / "run")]) == 2
    assert "checkpoint" in capsys.readouterr().err and not (tmp_path / "run" / "exports").exists()


@pytest.mark.parametrize(("name", "value"), [("checkpoint", 256), ("checkpoint", "best"), ("seed", 6)])
def test_an_exported_policy_is_one_checkpoint_of_one_seed(exported: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be left out for an exported policy"):
        qfleet.load(exported, **{name: value})


def test_code_that_only_the_folder_names_is_not_run(
    own_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "raise SystemExit('it was imported')"
    (own_copy / "evil.py").write_text(module)
    monkeypatch.chdir(own_copy)
    change(own_copy, agent__network="evil:make")
    with pytest.raises(ConfigError, match="names network evil:make, of module evil; if you trust that module, give"):
        qfleet.load(own_copy)
    with pytest.raises(ConfigError, match="nothing in a run's folder is ever imported"):
        qfleet.load(own_copy, trust=True)
    change(own_copy, agent__network=None, env="evil:Env-v0")
    policy = qfleet.load(own_copy)
    assert policy(OBSERVATIONS).shape == (7,), "acting needs no environment"
    with pytest.raises(ConfigError, match="environment evil:Env-v0, of module evil"):
        policy.evaluate(1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("format", []),
        ("format", "pickle"),
        ("env_steps", -1),
        ("env_steps", "../../x"),
        ("trained_seed", 1.5),
        ("environment", {"name": "X"}),
        ("evaluation", {"exploration": 2.0}),
        ("evaluation", None),
        ("has_own_network", "no"),
        ("agent", None),
        ("env", "x" * 501),
        ("num_seeds", 3),
    ],
)
def test_a_config_that_is_never_written_is_refused(own_copy: Path, name: str, value: Any) -> None:
    change(own_copy, **{name: value})
    with pytest.raises(ConfigError, match="config.json must hold what `qfleet export` writes, got .*; export the run"):
        qfleet.load(own_copy)


def damage(kind: str, file: Path) -> None:
    match kind:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1])
        case "pickle":
            file.write_bytes(pickle.dumps({"hidden": np.ones(3)}))
        case "link":
            file.rename(file.with_name("elsewhere"))
            file.symlink_to(file.with_name("elsewhere"))
        case "large":
            file.write_bytes(file.read_bytes() + bytes(2**24 + 10_000))


@pytest.mark.parametrize("kind", ["missing", "truncated", "pickle", "link", "large"])
def test_weights_that_are_no_safetensors_file_are_refused(own_copy: Path, kind: str) -> None:
    damage(kind, own_copy / "model.safetensors")
    with pytest.raises(ConfigError, match="must have its parameters in a safetensors file, got .*model.safetensors"):
        qfleet.load(own_copy)


def test_weights_of_another_network_are_refused(own_copy: Path) -> None:
    change(own_copy, agent__hidden_sizes=[9])
    with pytest.raises(ConfigError, match=r"should be float32\[9, .*has float32\[8, |should be .* restore the folder"):
        qfleet.load(own_copy)


def test_a_network_given_as_an_argument_is_needed_again(exported: Path, tmp_path: Path) -> None:
    network = qfleet.Network(lambda key: [jnp.ones((4, 2)), {"b": jnp.ones(2)}], lambda p, obs: obs @ p[0] + p[1]["b"])
    recorded = read_exported(exported)
    assert recorded is not None
    origin = dataclasses.replace(recorded.origin, has_own_network=True)
    env, params = qfleet.make_env("CartPole-v1"), [np.ones((4, 2), np.float32), {"b": np.float32([2.0, 3.0])}]
    policy = qfleet.Policy(env, network, params, "step256", origin=origin)
    out = policy.export(tmp_path / "out")
    again = qfleet.load(out, network=network)
    assert isinstance(again.params, list)
    assert np.array_equal(again.q_values(OBSERVATIONS), policy.q_values(OBSERVATIONS))
    with pytest.raises(ConfigError, match="this run has its own network; give `network`"):
        qfleet.load(out)


def test_a_full_disk_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qfleet.exporting.formats.write_weights", fail)
    with pytest.raises(RunFailed, match=r"got .*out \(No space left on device\); free space"):
        qfleet.load(exported).export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_for_the_hub_has_a_card_that_the_hub_reads(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = pytest.importorskip("yaml")
    out = tmp_path / "for hub"
    assert main(["export", str(exported), "--hub-folder", "--episodes", "4", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"to upload it: hf upload USER/REPOSITORY '{out}'"
    names = sorted(path.name for path in out.iterdir())
    assert [name for name in names if name != "replay.mp4"] == ["README.md", "config.json", "model.safetensors"]
    text = (out / "README.md").read_text(encoding="utf-8")
    _, facts, body = text.split("---\n", 2)
    facts = yaml.safe_load(facts)
    assert (facts["library_name"], facts["pipeline_tag"]) == ("qfleet", "reinforcement-learning")
    assert "reinforcement-learning" in facts["tags"] and "CartPole-v1" in facts["tags"]
    (result,) = facts["model-index"][0]["results"]
    assert result["task"]["type"] == "reinforcement-learning" and result["dataset"]["type"] == "CartPole-v1"
    returns = qfleet.load(exported).evaluate(4)
    half_width = 1.96 * np.std(returns, ddof=1) / 2
    assert result["metrics"][0]["type"] == "mean_reward"
    assert result["metrics"][0]["value"] == f"{np.mean(returns):.2f} +/- {half_width:.2f}"
    assert "hf download USER/REPOSITORY --local-dir policy" in body and 'qfleet.load("policy")' in body
    assert "over 4 episodes, all different" in body and "| in | `observation` | `[batch, 4]` | float32 |" in body
    assert qfleet.load(out).label == "step256-trained6"
    for block in body.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_a_card_is_one_that_huggingfaces_own_library_takes() -> None:
    cards = pytest.importorskip("huggingface_hub.repocard")
    config = qfleet.TrainConfig(env='odd: "name" | #1', preset="dqn")
    origin = Origin(config=config, env_steps=10, trained_seed=None, environment=None, has_own_network=False)
    interface: dict[str, Any] = {"inputs": [], "outputs": [], "preprocessing": [], "actions": {"meaning": "as it is"}}
    result = hub.Result(3, 1, 5.0, 0.0, 0.0)
    options = EvaluationOptions(exploration=0.01)
    text = hub.model_card(origin, interface, result, options, has_video=True)
    card = cards.ModelCard(text)
    (found,) = card.data.eval_results
    assert (found.metric_value, found.dataset_name) == ("5.00 +/- 0.00", config.env)
    assert "Mean return: 5.00 over 3 episodes, 1 different, with 1 % random actions." in card.text


def test_no_video_is_no_reason_to_fail(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    out = qfleet.load(exported).export_hub_folder(tmp_path / "out", 2)
    assert not (out / "replay.mp4").exists() and "replay.mp4" not in (out / "README.md").read_text(encoding="utf-8")
    assert "gets no video: videos need PyAV and Pillow" in caplog.text


def test_the_help_does_not_wait_for_jax() -> None:
    code = "import sys; from qfleet.cli import export_command; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("env", "extra"),
    [
        ("CartPole-v1", ""),
        ("LunarLander-v3", "box2d"),
        ("gym:LunarLander-v3", "box2d"),
        ("gymnax:Breakout-MinAtar", "gymnax"),
        ("xminigrid:MiniGrid-Empty-5x5", "xminigrid"),
        ("ale:Pong", "atari"),
        ("gym:ale_py:ALE/Pong-v5", "atari"),
        ("highway_env:highway-fast-v0", "driving"),
        ("my_module:MyEnv-v0", ""),
    ],
)
def test_a_model_card_names_the_extra_that_its_environment_needs(env: str, extra: str) -> None:
    assert hub.extra_of(env) == extra
