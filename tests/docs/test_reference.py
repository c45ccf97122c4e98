"""The generated pages are what the code says now."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qfleet.config import TOPOLOGIES, AgentConfig, MeshConfig, TrainConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "tools"))
        for name in ("pictures", "curves"):
            importlib.import_module(name)
        return importlib.import_module("reference")


def test_every_generated_page_is_up_to_date(reference: ModuleType) -> None:
    stale = [name for name, text in reference.pages().items() if (DOCS / name).read_text(encoding="utf-8") != text]
    assert stale == [], "write them with `make docs`, or python docs/tools/reference.py"


def test_every_picture_is_as_its_tool_draws_it(reference: ModuleType) -> None:
    pictures, curves = sys.modules["pictures"], sys.modules["curves"]
    drawn = {name: draw().svg() for name, draw in pictures.PICTURES.items()}
    measured = json.loads((DOCS / "pictures/curves.json").read_text(encoding="utf-8"))
    drawn["curves"] = curves.draw(measured).svg()
    for name, text in drawn.items():
        assert (DOCS / f"pictures/{name}.svg").read_text(encoding="utf-8") == text, "python docs/tools/pictures.py"
        assert "prefers-color-scheme:dark" in text
    assert (DOCS / "pictures/agent.webp").stat().st_size < 1_000_000


def test_every_setting_is_on_the_page_with_its_default(reference: ModuleType) -> None:
    text = reference.settings()
    for kind in (TrainConfig, AgentConfig, *TOPOLOGIES.values()):
        for field in dataclasses.fields(kind):
            if field.name not in ("env", "agent", "topology", "mesh"):
                assert f"| `{field.name}` |" in text
    assert "| `discount` | number | `0.99` | per environment step |" in text
    assert "| `target_update_period` | whole number | `500` | learner steps |" in text


def test_every_setting_with_a_unit_or_a_source_of_its_own_exists(reference: ModuleType) -> None:
    settings = sys.modules["settings"]
    kinds = (TrainConfig, AgentConfig, *TOPOLOGIES.values())
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    names |= {f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)}
    assert {*settings._UNITS, *settings.DEFAULT_SOURCES, *settings.DEFAULTS, *settings.TEXTS} - names == set()


def test_every_command_and_each_of_its_flags_is_on_the_page(reference: ModuleType) -> None:
    text = reference.commands()
    for command in ("train", "eval", "watch", "resume", "devices", "envs", "check-env", "presets"):
        assert f"## qfleet {command}" in text
    for flag in ("--env-steps", "--no-double", "--train-seed", "--frames-per-second", "--trust", "--json"):
        assert f"`{flag}`" in text
