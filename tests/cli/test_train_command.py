"""What `qfleet train` reads from a command line: a config, or one clear error."""

import contextlib
import io
import os
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from random_settings import WORDS, Draw

import qfleet
from qfleet.cli import resume_command, train_command
from qfleet.cli.check_env_command import run as main_of_check_env
from qfleet.cli.main import main
from qfleet.cli.train_command import parse
from qfleet.config import TOPOLOGIES, AgentConfig, ConfigError, GossipConfig, OverlappedConfig, TrainConfig
from qfleet.config.encoding import decode, encode
from qfleet.config.option_text import read_option
from qfleet.presets import PRESETS, make_config

NUM_EXAMPLES = int(os.environ.get("QFLEET_TEST_COMMAND_LINES", "30"))
"""Number of random command lines; 2,000 take three minutes."""


def config_of(words: str) -> TrainConfig:
    return parse(words.split()).config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50", 50), ("-5", -5), ("0.5", 0.5), ("1e-3", 1e-3), ("1.0", 1.0), ("true", True), ("False", False),
        ("none", None), ("null", None), ("8x8", "8x8"), ("human", "human"), ("", ""), ("1_000", "1_000"),
        ("[1, 2.0, true]", [1, 2.0, True]), ("('a', 'b')", ("a", "b")), ("['SF', 'HG']", ["SF", "HG"]),
        ('{"lanes": 3}', {"lanes": 3}), ('"50"', "50"), ("[1", "[1"), ("[" * 100_000, "[" * 100_000),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_an_option_is_read_as_what_it_looks_like(text: str, expected: Any) -> None:
    assert repr(read_option(text)) == repr(expected)


def test_environment_options_are_the_same_on_the_command_line_in_python_and_on_disk() -> None:
    config = config_of("FrozenLake-v1 --env-options max_episode_steps 50 is_slippery false map_name 8x8")
    expected = {"max_episode_steps": 50, "is_slippery": False, "map_name": "8x8"}
    assert repr(config.env_options) == repr(expected)
    assert config == make_config("FrozenLake-v1", env_options=expected) == decode(encode(config))
    assert qfleet.make_env(config.env, **config.env_options).spec.time_limit == 50


@pytest.mark.parametrize("words", ["E --env-options a", "E --env-options a 1 a 2", "E --env-options a nan"])
def test_environment_options_that_are_no_pairs_or_not_finite_are_refused(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["train", *words.split()]) == 2
    assert "env-options" in capsys.readouterr().err.replace("_", "-")


def test_the_maker_of_a_registered_environment_gets_its_options_whenever_it_is_called() -> None:
    asked = []

    def make(size: int) -> qfleet.InGraphEnv:
        asked.append(size)
        spec = qfleet.EnvSpec(
            name="Sized-v0", observation_shape=(size,), observation_dtype=np.dtype(np.float32), num_actions=2
        )

        def step(state: Any, action: Any, key: Any) -> qfleet.StepResult:
            return qfleet.StepResult(state, jnp.zeros(size), jnp.float32(1), jnp.bool_(True), jnp.bool_(False))

        return qfleet.InGraphEnv(spec, lambda key: (jnp.int32(0), jnp.zeros(size)), step)

    qfleet.register_env("Sized-v0", make)
    assert config_of("Sized-v0 --env-options size 3").topology.name == "fused"
    assert make_config("Sized-v0", env_options={"size": np.int64(3)}).topology.name == "fused"
    assert len(asked) >= 2 and all(size == 3 and type(size) is int for size in asked)


def test_trackers_may_be_named_one_after_the_other() -> None:
    assert parse(["CartPole-v1", "--log", "wandb", "--log", "mlflow"]).log == ("wandb", "mlflow")
    assert parse(["CartPole-v1"]).log == ()
    flags, _ = resume_command.parse(["RUN", "--log", "mlflow"])
    assert flags.log == ("mlflow",)


@pytest.mark.parametrize("preset", ["pqn", "rainbow_lite", "ape_x"])
def test_both_forms_of_every_flag_are_read_whatever_the_preset_says(preset: str) -> None:
    for flag in ("dueling", "layer-norm", "checkpoint-replay"):
        for value in (True, False):
            config = config_of(f"CartPole-v1 --preset {preset} --{'' if value else 'no-'}{flag}")
            assert getattr(config, flag.replace("-", "_"), getattr(config.agent, flag.replace("-", "_"), None)) is value
    if PRESETS[preset].settings.get("replay") != "none":
        assert config_of(f"CartPole-v1 --preset {preset} --double").agent.double
    assert not config_of(f"CartPole-v1 --preset {preset} --no-double").agent.double
    assert not parse(["CartPole-v1", "--preset", preset, "--quiet", "--no-quiet"]).quiet


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("CartPole-v1 --env-steps 1e6", {"env_steps": 1_000_000}),
        ("--lock-step FrozenLake-v1 --preset dqn", {"topology": OverlappedConfig(lock_step=True)}),
        ("--preset ape_x --num-actors 2 CartPole-v1", {"preset": "ape_x"}),
        ("CartPole-v1 --preset dqn --preset pqn", {"preset": "pqn"}),
        ("CartPole-v1 --topology decentralised --exchange gossip", {"topology": GossipConfig()}),
        ("CartPole-v1 --run-dir None", {"run_dir": None}),
    ],
)
def test_flags_mean_the_same_wherever_they_stand(words: str, expected: dict[str, Any]) -> None:
    config = config_of(words)
    preset = expected.pop("preset", config.preset)
    assert config.preset == preset
    assert [getattr(config, name) for name in expected] == list(expected.values())


def test_a_mode_that_a_flag_chooses_drops_the_presets_settings_without_effect() -> None:
    assert config_of("CartPole-v1 --preset double_dqn --replay none --num-minibatches 4").agent.double is False
    assert config_of("CartPole-v1 --preset pqn --replay uniform --batch-size 32").agent.batch_size == 32


def random_command_line(seed: int) -> list[str]:
    """Returns up to six flags with values that may fit, in any order with the environment."""
    draw, generator = Draw(seed), random.Random(seed)
    kinds = train_command.flag_kinds() | {"env": str, "log": str}
    topology = generator.choice(list(TOPOLOGIES))
    known = {field.name for kind in (AgentConfig, TrainConfig, TOPOLOGIES[topology]) for field in fields(kind)}
    words = [["--topology", topology]]
    if generator.random() < 0.2:
        words, known = [], set(kinds)
    for name in generator.sample(sorted(known & set(kinds)), generator.randrange(7)):
        flag, kind = name.replace("_", "-"), kinds[name]
        if kind is bool:
            words.append([generator.choice([f"--{flag}", f"--no-{flag}"])])
            continue
        value = draw.of_kind(kind) if generator.random() < 0.8 else draw.anything(1)
        if name in ("topology", "preset", "env"):
            value = generator.choice(
                ["gossip", "decentralised", "dqn", "double_dqn", "rainbow_lite", "ape_x", "pqn", ""]
            )
        if isinstance(value, dict):
            texts = [str(item) for pair in value.items() for item in pair]
        else:
            texts = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
        is_joined = generator.random() < 0.3 and len(texts) == 1
        words.append([f"--{flag}={texts[0]}"] if is_joined else [f"--{flag}", *texts])
    if generator.random() < 0.1:
        words.append([generator.choice(WORDS)])
    if generator.random() < 0.9:
        words.append([generator.choice(["CartPole-v1", "FrozenLake-v1", "gymnax:Breakout-MinAtar", "gym:X", "ale:Y"])])
    generator.shuffle(words)
    return [text for group in words for text in group]


@pytest.mark.parametrize("start", range(0, NUM_EXAMPLES, 20))
def test_a_command_line_is_a_config_or_one_clear_error(start: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(start, min(start + 20, NUM_EXAMPLES)):
        words, output = random_command_line(seed), io.StringIO()
        code, message = 0, ""
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                config = parse(words).config
            assert decode(encode(config)) == config, words
        except ConfigError as error:
            code, message = 2, str(error)
        except SystemExit as error:
            code, message = int(error.code or 0), " ".join(output.getvalue().split())  # without the frame around it
        longest = 3_000 + 2 * max(map(len, words), default=0)  # the parser repeats a word that it can't read
        assert code in (0, 2) and (code == 0 or 10 < len(message) < longest), words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("RUN", {}),
        ("--lock-step RUN", {"lock_step": True}),
        ("--num-actors 8 RUN --no-lock-step", {"num_actors": 8, "lock_step": False}),
        ("RUN --topology=fused --num-envs 1e2 --mesh.data 2", {"topology": "fused", "num_envs": 100, "mesh.data": 2}),
    ],
)
def test_resume_tells_a_topologys_flags_from_its_own(words: str, settings: dict[str, Any]) -> None:
    flags, found = resume_command.parse([*words.split(), "--env-steps", "2e3", "--quiet"])
    assert (flags.run, flags.env_steps, flags.checkpoint, flags.quiet) == ("RUN", 2_000, None, True)
    assert found == settings


@pytest.mark.parametrize("count", ["0", str(2**64), "1" + 400 * "0", "2.5", "nan"])
@pytest.mark.parametrize("command", ["resume RUN --env-steps", "eval RUN --episodes", "check-env E --steps"])
def test_a_count_out_of_bounds_is_refused_before_anything_is_read(
    command: str, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*command.split(), count])
    except SystemExit as error:
        code = int(error.code or 0)
    message = " ".join(capsys.readouterr().err.split())
    assert code == 2 and "must be a whole number" in message and "Traceback" not in message


def test_check_env_gives_options_to_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check-env", "gym:FrozenLake-v1", "--steps", "20", "--env-options"]
    assert main([*command, "map_name", "8x8", "is_slippery", "false"]) == 0
    assert main([*command, "size", "8"]) == 2
    error = capsys.readouterr().err
    assert "gym:FrozenLake-v1" in error and "'size'" in error and "Traceback" not in error


@pytest.mark.parametrize("flag", ["--env-options", "--hidden-sizes", "--optimiser-options", "--hidden_sizes"])
def test_a_flag_of_several_values_is_given_once(flag: str) -> None:
    name = flag.replace("_", "-")
    for words in (f"E {flag} 1 2 {name} 3 4", f"E {flag}=1 --seed 3 {name} 3 4"):
        with pytest.raises(ConfigError, match=f"{name} must be given once, with all of its values, got it 2 times"):
            config_of(words)
    with pytest.raises(ConfigError, match="must be given once"):
        main_of_check_env(["E", "--env-options", "a", "1", "--env-options", "b", "2"])


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_written_as_any_option_is(word: str) -> None:
    config = config_of(f"CartPole-v1 --preset dqn --max-gradient-norm {word} --stop-return {word}")
    assert config.agent.max_gradient_norm is None and config.stop_return is None
    flags, _ = resume_command.parse(["RUN", "--stop-return", "none", "--env-steps", word])
    assert (flags.stop_return, flags.env_steps) == ("none", None)
