"""The examples, each with a small budget, started as a user would start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BUDGETS = {
    "atari_pong.py": ["--env-steps", "128", "--replay-capacity", "1000", "--sticky", "--eval-max-episode-steps", "20"],
    "callbacks.py": ["--env-steps", "4096"],
    "driving.py": ["--num-env-workers", "1", "--env-steps", "128", "--eval-max-episode-steps", "4"],
    "laptop_fleet.py": ["--env-steps", "1500", "--num-actors", "1"],
    "lunar_lander.py": ["--env-steps", "1024"],
    "masked_grid.py": ["--env-steps", "1024"],
    "own_loss.py": ["--env-steps", "2048"],
    "trading.py": ["--env-steps", "1024"],
}
NEEDS = {"atari_pong.py": "ale_py", "driving.py": "highway_env", "laptop_fleet.py": "ray", "lunar_lander.py": "Box2D"}
"""What an example needs besides qfleet."""


def expect_to_run(example: str, tmp_path: Path) -> None:
    """Runs an example to its end, or skips the test if it needs what isn't installed."""
    if example in NEEDS:
        pytest.importorskip(NEEDS[example])
    command = [sys.executable, str(EXAMPLES / example), *BUDGETS[example], "--run-dir", str(tmp_path / "run")]
    variables = dict(os.environ)
    if example == "trading.py":  # the fastest to compile, which is optimised as in a user's run
        variables.pop("XLA_FLAGS", None)
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert finished.returncode == 0, finished.stderr
    assert "steps" in finished.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "env steps"
