"""The Python blocks in the pages run, and their commands have flags that there are.

Blocks of a page run one after the other, in one namespace and an empty folder. Training is cut short: what is tested is
that the calls are right, and not what is learned.
"""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

import qfleet
from qfleet.cli import main as command_line
from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.config import TrainConfig
from qfleet.envs import registry

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
THEIRS = ("# Stable-Baselines3", "# RLlib", "# Ray Serve", "# LitServe")
"""How blocks begin that show other libraries, which aren't installed here."""


def blocks_of(page: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if not block.startswith(THEIRS)]


PAGES_WITH_BLOCKS = [page for page in PAGES if blocks_of(page) and not page.startswith("docs/tutorials/")]


def cut_short(config: TrainConfig) -> TrainConfig:
    """Returns a config of the same kind with a tiny network and two evaluations."""
    changes: dict[str, Any] = {"hidden_sizes": (8,)}
    if config.agent.replay != "none":
        changes |= {
            "replay_capacity": min(config.agent.replay_capacity, 2_000),
            "warmup_env_steps": min(config.agent.warmup_env_steps, 100),
        }
    else:
        changes |= {"num_epochs": 1, "num_minibatches": 1}
    agent = dataclasses.replace(config.agent, **changes)
    return dataclasses.replace(
        config, agent=agent, env_steps=min(config.env_steps, 1_024), stop_return=None, eval_period_env_steps=512,
        eval_episodes=2, eval_max_episode_steps=20, report=False,
    )  # fmt: skip


@pytest.fixture
def _short_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_config = qfleet.make_config
    short: Any = lambda *args, **settings: cut_short(make_config(*args, **settings))  # noqa: E731
    monkeypatch.setattr(qfleet, "make_config", short, raising=False)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # a page's environments end with it
    monkeypatch.chdir(tmp_path)


def run_blocks(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.usefixtures("_short_runs")
@pytest.mark.parametrize("page", [page for page in PAGES_WITH_BLOCKS if "getting-started" not in page])
def test_the_python_blocks_of_a_page_run(page: str) -> None:
    run_blocks(page)
    if page == "docs/environments.md":
        config = qfleet.make_config("Corridor-v0", num_envs=4, env_steps=256, run_dir="runs/corridor")
        assert qfleet.train(config)["env_steps"] == 256


@pytest.mark.usefixtures("_short_runs")
def test_the_first_run_of_a_user_goes_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks("docs/getting-started.md")
    assert names["summary"]["env_steps"] >= 1_024 and (names["terminated"] or names["truncated"])
    text = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    qfleet (eval latest|watch latest|report latest|resume latest .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    pytest.importorskip("av")
    for command in commands:
        short = {"eval": "--episodes 2 --max-episode-steps 20", "resume": "--quiet --env-steps 1536"}
        arguments = re.sub(r"--env-steps \d+", "", command).split()
        assert command_line.main([*arguments, *short.get(arguments[0], "").split()]) == 0
    assert "mean greedy return" in capsys.readouterr().out
    assert list(Path("runs/first/videos").glob("*.mp4")) and Path("runs/first/checkpoints/1536").is_dir()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_and_has_flags_that_there_are(page: str) -> None:
    text = re.sub(r"\\\n *", "", (ROOT / page).read_text(encoding="utf-8"))
    for command, rest in re.findall(r"^ {4}(?:\w*\$ )?qfleet ([a-z][a-z-]*)([^|\[\n]*)$", text, re.MULTILINE):
        assert command in command_line._COMMANDS, f"{page}: qfleet {command}"
        arguments = shlex.split(rest, comments=True)
        if command in ("train", "devices", "plan") or not arguments or arguments[0].isupper():
            continue  # tests/test_docs.py reads the flags of those that train
        module = importlib.import_module(f"qfleet.cli.{command.replace('-', '_')}_command")
        if command == "resume":
            module.parse(arguments)
            continue
        if command == "sweep":
            arguments, _ = module.divide(arguments)
        (flags,) = (kind for name, kind in vars(module).items() if name.endswith("Flags"))
        tyro.cli(flags, args=arguments, registry=FLAG_TYPES)


@pytest.mark.parametrize("page", PAGES)
def test_every_extra_and_every_target_of_make_that_a_page_names_exists(page: str) -> None:
    text, project = (ROOT / page).read_text(encoding="utf-8"), (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    for named in re.findall(r"qfleet\[([\w,]+)\]", text):
        assert set(named.split(",")) <= extras, f"{page}: {named}"
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)


@pytest.mark.usefixtures("_short_runs")
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs/tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_kept_without_outputs(notebook: Path) -> None:
    """Cells run here, in order. A kernel would start a process and import JAX again, and prove nothing more."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), str(notebook), "exec"), names)
    assert names["policy"] is not None and len(cells) >= 4
