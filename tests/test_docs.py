"""The examples, links and commands in the documentation work."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.cli.train_command import parse
from qfleet.config import TOPOLOGIES, AgentConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_every_python_block_compiles_and_every_name_of_qfleet_in_it_exists() -> None:
    blocks = [block for name in PAGES for block in python_blocks(name)]
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "block", "exec")
        for name in re.findall(r"\bqfleet\.(\w+)\(", block):
            assert callable(getattr(qfleet, name))
        for names in re.findall(r"from qfleet import (.+)", block):
            assert all(hasattr(qfleet, name.strip()) for name in names.split(","))


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(qfleet, name) is not None for name in qfleet.__all__)
    assert set(qfleet.__all__) == set(dir(qfleet))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_to_a_file_of_ours_leads_somewhere(name: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]*)", (ROOT / name).read_text(encoding="utf-8"))
    assert [target for target in targets if not ((ROOT / name).parent / target).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_link_to_a_section_of_ours_leads_there(name: str) -> None:
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]*)\)", (ROOT / name).read_text(encoding="utf-8")):
        page = (ROOT / name).parent / target if target else ROOT / name
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", [*PAGES, "examples/cluster.yaml"])
def test_every_command_that_trains_has_flags_that_there_are(name: str) -> None:
    text = re.sub(r"\\\n[# ]*", "", (ROOT / name).read_text(encoding="utf-8"))
    shell = r"(?:\w*\$|RAY_AUTH_MODE=token)?"
    commands = re.findall(rf"^[# ]*{shell} *qfleet (?:train|devices|plan) ([^\[\n]+)$", text, re.MULTILINE)
    for command in commands:
        env, *flags = shlex.split(command.partition(" > ")[0], comments=True)
        if env not in ("corridor:Corridor-v0", "--config"):  # the pages' own environment and file, which aren't there
            assert parse([env, *flags]).config.env == env


def test_every_flag_of_the_fleets_page_is_one() -> None:
    text = (ROOT / "docs/fleet.md").read_text(encoding="utf-8")
    kinds = (AgentConfig, TrainConfig, *TOPOLOGIES.values())
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--(?:no-)?([a-z][a-z-]+)", text)}
    assert len(flags) > 30
    assert flags - fields == set()


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_the_table_of_devices_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ale_py")
    monkeypatch.setattr("qfleet.topologies.footprint.available_bytes", lambda devices: 2**40)  # whatever is free now
    text = (ROOT / "docs/topologies.md").read_text(encoding="utf-8")
    command, shown = re.findall(r"^    \$ qfleet (devices .*)\n((?:    .*\n|\n)+)", text, re.MULTILINE)[0]
    assert main(command.split()) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = [line.split() for line in shown.strip().splitlines()]
    assert lines[0][:-1] == printed[0][:-1]  # the last word is the platform
    assert lines[1:] == printed[1 : len(lines)]
