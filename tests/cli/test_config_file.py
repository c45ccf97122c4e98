"""`qfleet train --config FILE` and `--print-config`: a run's settings as a file, and back, exactly."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run
from random_settings import random_config

import qfleet
from qfleet.cli.config_file import config_text, read_config_file
from qfleet.cli.main import main
from qfleet.cli.train_command import parse
from qfleet.config import (
    ActorLearnerConfig,
    ConfigError,
    FusedConfig,
    GossipConfig,
    MeshConfig,
    OverlappedConfig,
    TrainConfig,
)
from qfleet.config.encoding import decode, encode
from qfleet.presets import PRESETS, make_config
from qfleet.runtime.run_directory import RunDirectory

NUM_EXAMPLES = int(os.environ.get("QFLEET_TEST_CONFIGS", "60"))
"""Number of random configs."""


def printed(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what a command prints on stdout."""
    capsys.readouterr()
    assert main(arguments.split()) == 0
    return capsys.readouterr().out


def file_with(folder: Path, text: str, name: str = "a.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_every_config_that_can_be_made_comes_back_from_what_is_printed(tmp_path: Path) -> None:
    for seed in range(NUM_EXAMPLES):
        config = random_config(seed)
        file = read_config_file(file_with(tmp_path, config_text(config, "a test would run")))
        assert file.is_complete
        back = decode(file.content)
        assert back == config and repr(back) == repr(config)  # 1, 1.0 and True are equal, but print as what they are


@pytest.mark.parametrize(
    "text", ["none", "None", '"none"', '"', "", "a\nb\x00\x7f\x1b", "\udc80", "ünï 🚗", "'''", "1e3"]
)
def test_texts_that_toml_gives_a_meaning_come_back_as_they_were(text: str, tmp_path: Path) -> None:
    options = {text: [text, None, {"deep": {text: text}, "": {}}], "x": None, "big": 2**64 - 1, "small": 5e-324}
    config = TrainConfig(env=f"E{text}", env_options=options, run_dir=text.replace("\x00", "") or None, preset=text)
    back = decode(read_config_file(file_with(tmp_path, config_text(config, text))).content)
    assert repr(back) == repr(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_the_same_from_what_it_prints(preset: str, tmp_path: Path) -> None:
    """The flags of `train` leave out settings without effect; the file gives all of them."""
    env = "ale:Pong" if PRESETS[preset].for_pixels else "CartPole-v1"
    config = make_config(env, preset, env_steps=300_000)
    path = file_with(tmp_path, config_text(config, "a test would run"))
    request = parse(["--config", path])
    assert request.config == config and request.reason == ""


def test_train_prints_what_it_would_run_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "CartPole-v1 --seed 3 --num-seeds 2 --stop-return 475 --mesh.data 1 --learning-rate 4e-3"
    text = printed(f"train {flags} --print-config", capsys)
    assert not list(tmp_path.iterdir())
    lines = text.splitlines()
    assert "learning_rate = 0.004  # default 0.001" in lines and "seed = 3  # default 0" in lines
    assert "# Final learning rate as a fraction of the first." in text
    assert "pqn, chosen because" in " ".join(lines[:3]) and max(map(len, lines)) <= 100
    path = file_with(tmp_path, text)
    assert parse(["--config", path]).config == parse(flags.split()).config
    again = printed(f"train --config {path} --print-config", capsys)
    assert again.partition("schema")[2] == text.partition("schema")[2]


def test_a_file_may_be_a_pipe(tmp_path: Path) -> None:
    config = make_config("CartPole-v1", "dqn")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        file.write(config_text(config, "a test would run"))
    assert parse([f"--config=/dev/fd/{reading}"]).config == config
    os.close(reading)


def test_the_config_of_a_runs_folder_is_a_file_too(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", make_config("CartPole-v1", "dqn", env_options={"x": "none", "y": None}))
    request = parse(["--config", str(run.config_path), "--run-dir", "elsewhere"])
    assert request.config == dataclasses.replace(run.config, run_dir="elsewhere")
    content = encode(run.config)
    assert parse(["--config", file_with(tmp_path, json.dumps(content), "a.json")]).config == run.config


def test_flags_beside_a_whole_file_win(tmp_path: Path) -> None:
    config = make_config("CartPole-v1", "dqn", num_envs=32, mesh=MeshConfig(data=2))
    path = file_with(tmp_path, config_text(config, "a test would run"))

    def changed(words: str) -> TrainConfig:
        return parse([*words.split(), "--config", path]).config

    found = changed("Acrobot-v1 --seed 7 --learning-rate 0.5 --mesh.model 2 --max-gradient-norm none --quiet")
    agent = dataclasses.replace(config.agent, learning_rate=0.5, max_gradient_norm=None)
    topology = FusedConfig(num_envs=32, mesh=MeshConfig(data=2, model=2))
    assert found == dataclasses.replace(config, env="Acrobot-v1", seed=7, agent=agent, topology=topology)
    assert changed("--topology gossip --num-processes 4").topology == GossipConfig(num_envs=32, num_processes=4)
    for words, message in (
        ("--preset pqn", "preset must be left out with a file that gives every setting"),
        ("--num-actors 2", "num_actors must come with topology actor-learner, got topology fused"),
        ("--n-step 0", "n_step must be a whole number, at least 1, got 0"),
        ("--trace-decay 0.5", "trace_decay must be left out with replay uniform"),
        ("--num-envs 33", "num_envs must be divisible by mesh.data|num_envs must divide"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed(words)


def test_what_a_file_leaves_out_is_chosen_as_flags_are(tmp_path: Path) -> None:
    path = file_with(
        tmp_path,
        """
        env = "CartPole-v1"
        preset = "rainbow_lite"
        topology = "actor-learner"
        env_steps = 1e5
        num_actors = 3
        mesh.data = 2
        [agent]
        learning_rate = 0.25
        max_gradient_norm = "none"
        """,
    )
    flags = "CartPole-v1 --preset rainbow_lite --topology actor-learner --env-steps 1e5 --num-actors 3 --mesh.data 2"
    expected = parse([*flags.split(), "--learning-rate", "0.25", "--max-gradient-norm", "none"])
    assert parse(["--config", path]) == expected
    more = ["--num-actors", "5", "--mesh.model", "2", "--preset", "dqn"]
    assert parse(["--config", path, *more]).config == parse(
        [*flags.replace("rainbow_lite", "dqn").split(), "--learning-rate=0.25", "--max-gradient-norm=none", *more]
    ).config  # fmt: skip
    assert isinstance(expected.config.topology, ActorLearnerConfig)
    assert parse(["CartPole-v1", "--config", file_with(tmp_path, "seed = 4")]).config.seed == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a run needs an environment, got none in .*a.toml; add env = 'NAME', or give ENV"),
        ('env = "E"\nlearning_rat = 1', r"got 'learning_rat'\. Did you mean learning_rate"),
        ('env = "E"\n[agent]\ndoubel = true', r"got 'doubel'\. Did you mean double"),
        ('env = "E"\n[topology.mesh]\ndeta = 2', "mesh must be a table of data and model, got 'deta'"),
        ('env = "E"\nmesh = 2', "mesh must be a table of data and model, got 2"),
        ('env = "E"\nagent = 3', "agent must be a table of settings, got 3"),
        ('env = "E"\ntopology = 3', "topology must be a table of settings, got 3"),
        ('env = "E"\nseed = 1\n[agent]\nseed = 2', "seed must be given once, got it twice"),
        ('env = "E"\n[topology]\nname = "fusd"', "topology must be one of .* Did you mean fused"),
        ('env = "E"\nlearning_rate = "fast"', "learning_rate must be a number, got 'fast'"),
        ('env = "E"\nseed = 2020-01-01', r"seed must be a whole number, got datetime\.date"),
        ('env = "E"\nlearning_rate = nan', "learning_rate must be finite, got nan"),
        ('env = "E"\nn_step = 0', "n_step must be a whole number, at least 1, got 0"),
        ('env = "E"\nenv = "F"', "TOML or JSON, got .*a.toml: Cannot overwrite a value"),
        ('env = "E', "TOML or JSON, got .*a.toml: .*; correct it"),
        ('{"env": "E",}', "TOML or JSON, got .*a.toml: .*; correct it"),
        ('{"env": NaN}', "NaN is no number in JSON"),
        ("x = " + 5000 * "[", "TOML or JSON"),
        ("# " + 2**20 * "x", "at most 1,048,576 bytes"),
        ("schema_version = 99", "schema_version must be 1 to .*, got 99, in .*a.toml"),
        ('{"qfleet_version": "1", "config": {"env": "E"}}', "config must have exactly its known fields"),
        ('{"qfleet_version": "1", "schema_version": 6, "config": 3}', "config must be an object, got 3"),
        ('env = "no_module:E"', "must be trusted before it is imported.* names env no_module:E.* give --trust"),
        ('env = "E"\n[agent]\nhead = "os:abort"', "must be trusted before it is imported.* names head os:abort"),
        (
            'env = "E"\n[topology]\nname = "gossip"\nray_address = "head:6379"',
            "must be trusted, because a cluster runs code: .* names head:6379.* give --ray-address head:6379, or",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    path = file_with(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as raised:
        parse(["--config", path])
    assert len(str(raised.value)) < 1_500


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        assert main(["train", "--config", str(path)]) == 2
        assert re.search(rf"--config must be a file of settings .*{reason}.*; give another", capsys.readouterr().err)
    assert main(["train", "CartPole-v1", "--trust"]) == 2
    assert "--trust must come with --config" in capsys.readouterr().err
    assert main(["devices", "CartPole-v1", "--print-config"]) == 2
    assert "--print-config belongs to `qfleet train`" in capsys.readouterr().err


def test_a_module_that_only_a_file_names_is_imported_once_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mazes_of_a_file.py").write_text("print('imported')\nfrom qfleet.envs.registry import make_env\n")
    config = make_config("gym:CartPole-v1", "dqn")
    of_file = dataclasses.replace(config, env="mazes_of_a_file:Maze-v0")
    path = file_with(tmp_path, config_text(of_file, "a test would run"))
    with pytest.raises(ConfigError, match="names env mazes_of_a_file:Maze-v0; if you trust it, give --trust"):
        parse(["--config", path])
    assert parse(["--config", path, "--trust"]).config == of_file
    assert parse(["mazes_of_a_file:Maze-v0", "--config", path]).config == of_file
    run = RunDirectory.create(tmp_path / "run", of_file)
    monkeypatch.chdir(run.path)
    with pytest.raises(ConfigError, match="nothing in a run's folder is ever imported"):
        parse(["--config", "config.json", "--trust"])


def test_resume_prints_the_config_that_a_run_would_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", topology=OverlappedConfig(num_envs=4))
    text = printed(f"resume {run.path} --env-steps 1e6 --num-env-workers 2 --stop-return 9 --print-config", capsys)
    topology = OverlappedConfig(num_envs=4, num_env_workers=2)
    expected = dataclasses.replace(run.config, env_steps=1_000_000, stop_return=9.0, topology=topology)
    assert decode(read_config_file(file_with(tmp_path, text)).content) == expected


def test_devices_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = qfleet.make_config("CartPole-v1", "dqn", hidden_sizes=(7,))
    path = file_with(tmp_path, config_text(config, "a test would run"))
    shown: dict[str, Any] = json.loads(printed(f"devices --config {path} --json", capsys))
    assert shown["preset"] == "dqn" and shown["bytes_per_device"] > 0
