"""Every example runs, with a small budget, as a person would start it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BUDGETS = {
    "atari_pong.py": ["--env-steps", "256", "--replay-capacity", "1000", "--sticky"],
    "driving.py": ["--env-steps", "128"],
    "lunar_lander.py": ["--env-steps", "1024"],
    "trading.py": ["--env-steps", "2048"],
}
NEEDS = {"atari_pong.py": "ale_py", "driving.py": "highway_env", "lunar_lander.py": "Box2D"}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(BUDGETS)


@pytest.mark.parametrize("example", sorted(BUDGETS))
def test_an_example_runs(example: str, tmp_path: Path) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example])
    command = [sys.executable, str(EXAMPLES / example), *BUDGETS[example], "--run-dir", str(tmp_path / "run")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "steps" in finished.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "env steps"
