"""Every example runs with a small budget, started as a user would start it."""

import json
import os
import re
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
SLOW = {"laptop_fleet.py"}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(BUDGETS)


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(BUDGETS)]
)
def test_an_example_runs(example: str, tmp_path: Path) -> None:
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


def test_rays_launcher_accepts_the_cluster_file() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    yaml = pytest.importorskip("yaml")
    text = (EXAMPLES / "cluster.yaml").read_text()
    util.validate_config(util.prepare_config(yaml.safe_load(text)))
    other_types = yaml.safe_load(re.sub(r"^# ?", "", text[text.index("# head_node_type") :], flags=re.MULTILINE))
    assert other_types["head_node_type"] in other_types["available_node_types"]
