"""The agents that come with the package: they load, play as well as their card says, and are found by name."""

import json
import re
from pathlib import Path

import pytest

import qfleet
from qfleet.cli.main import main
from qfleet.config import ConfigError
from qfleet.runtime.zoo import FOLDER, agents

_LARGEST_BYTES = 2_000_000


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def return_on_card(agent: str) -> float:
    """The mean return that the model card states."""
    found = re.search(r"^Mean return: (-?[\d.]+)", (FOLDER / agent / "README.md").read_text(), re.MULTILINE)
    assert found
    return float(found[1])


@pytest.mark.parametrize("agent", agents())
def test_an_agent_of_the_zoo_plays_as_well_as_its_card_says(agent: str) -> None:
    try:
        returns = qfleet.load(f"zoo:{agent}").evaluate(16, seed=7)
    except ConfigError as error:
        if "pip install 'qfleet[" not in str(error):
            raise
        pytest.skip(str(error))
    assert returns.mean() >= 0.7 * return_on_card(agent)


@pytest.mark.parametrize("agent", agents())
def test_an_agent_is_small_and_says_how_it_was_made(agent: str) -> None:
    files = {path.name: path for path in (FOLDER / agent).iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in files.values()) <= _LARGEST_BYTES
    card = files["README.md"].read_text()
    assert f'qfleet.load("zoo:{agent}")' in card
    env = json.loads(files["config.json"].read_text())["config"]["env"]
    assert f"qfleet train {env} " in card


def test_the_docs_show_the_agents_with_the_returns_of_their_cards() -> None:
    page = (Path(__file__).parents[1] / "docs/zoo.md").read_text()
    shown = dict(re.findall(r"^\| `zoo:([\w-]+)`.*\| (-?[\d.]+) ± [\d.]+ \|$", page, re.MULTILINE))
    assert {agent: float(mean) for agent, mean in shown.items()} == {agent: return_on_card(agent) for agent in agents()}


def test_an_agent_is_evaluated_and_exported_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "zoo:cartpole", "--episodes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["return_mean"] > 400
    assert qfleet.load(Path("zoo:cartpole")).spec.name == "CartPole-v1"
    assert main(["export", "zoo:cartpole"]) == 0
    (exported,) = Path("zoo/cartpole/exports").iterdir()
    assert qfleet.load(exported).evaluate(1).shape == (1,)


def test_the_zoo_lists_its_agents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"zoo:{name}" for name in agents()]


@pytest.mark.parametrize("command", ["eval", "watch", "export", "serve", "resume", "report"])
def test_an_agent_that_is_not_in_the_zoo_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "zoo:cartpol"]) == 2
    assert "got 'zoo:cartpol'. Did you mean cartpole?" in capsys.readouterr().err


def test_an_agent_of_the_zoo_has_no_run_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "zoo:cartpole"]) == 2
    assert "exported policy" in capsys.readouterr().err
