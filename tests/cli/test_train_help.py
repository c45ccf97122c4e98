"""The help of `qfleet train`: every setting once, in the group where one looks for it."""

import dataclasses
import re

import pytest

from qfleet.cli.main import main
from qfleet.cli.train_help import GROUPS, field_texts, groups
from qfleet.config import TOPOLOGIES, AgentConfig, OverlappedConfig, TrainConfig


def help_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_setting_is_in_exactly_one_group() -> None:
    fields = [field.name for config in (TrainConfig, AgentConfig) for field in dataclasses.fields(config)]
    grouped = [name for names in groups().values() for name in names]
    assert {name for names in GROUPS.values() for name in names} <= set(grouped)
    more = {"log", "quiet", "num_seeds_at_once", "config", "trust", "print_config"}
    assert sorted(grouped) == sorted({*fields, *more} - {"env", "agent", "topology"})


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_flag_is_shown_once_in_its_group(
    topology: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = "dqn"
    shown = help_of(["--topology", topology, "--preset", preset, "--help"], monkeypatch, capsys)
    flags: dict[str, list[str]] = {}
    for line in shown.splitlines():  # with boxes, or without if stdout can't show them
        if (heading := line.strip("╭─╮ ")).endswith(" options"):
            flags[title := heading] = []
        elif found := re.match(r"[│ ] --([a-z][a-z.-]*)", line):
            flags[title].append(found[1])
    for title, names in groups().items():
        assert flags[f"{title} options"] == [name.replace("_", "-") for name in names]
    own = [field.name.replace("_", "-") for field in dataclasses.fields(TOPOLOGIES[topology]) if field.name != "mesh"]
    assert flags["topology options"] == ["topology", *own]


@pytest.mark.parametrize("arguments", [["--help"], ["CartPole-v1", "-h"], ["CartPole-v1", "--seed", "1", "--help"]])
def test_the_environment_is_always_shown(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(arguments, monkeypatch, capsys)
    assert re.search(r"^usage: qfleet train .*ENV$", shown, re.MULTILINE)
    assert re.search(r"^[│ ] +ENV +Name of the environment", shown, re.MULTILINE)


def test_defaults_are_those_of_the_environment_and_the_preset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(["CartPole-v1", "--preset", "dqn", "--help"], monkeypatch, capsys).replace("│", " ")
    assert re.search(r"--preset \S+ Preset that [^(]*\(default: dqn\)", " ".join(shown.split()))


def test_the_text_of_a_field_is_the_one_below_it_in_its_own_class_or_a_base() -> None:
    texts = field_texts(OverlappedConfig)
    assert set(texts) >= {field.name for field in dataclasses.fields(OverlappedConfig)}
    assert texts["num_envs"] == "Lanes: environments stepped at once, over all devices."
    assert texts["lock_step"].startswith("Wait for each row's learning before the next action.")
