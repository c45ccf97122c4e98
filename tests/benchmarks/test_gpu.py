"""`benchmarks/gpu.py` in tiny sizes: whatever becomes of one part, all others are measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ale_py")
pytest.importorskip("gymnax")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

PARTS = ["device", "rollouts", "replay", "learner", "pong", "mesh", "tests", "train-breakout", "train-pong"]

FAILING_IMPORTS = {
    "raises": "raise ImportError('there is no ALE')",
    "ends its process": "import os; os._exit(7)",
}
"""Instead of ALE, which the parts with Pong import."""


def run(*arguments, **variables):
    """The exit code, the results by part, and all that was printed."""
    command = [sys.executable, str(SCRIPT), "--tiny", *arguments]
    ran = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    by_part = {part: [result for result in results if result["part"] == part] for part in PARTS}
    assert sum(map(len, by_part.values())) == len(results)
    return ran.returncode, by_part, ran.stdout


def test_every_part_is_measured_and_none_fails():
    code, results, output = run("--seconds", "100000")  # so that a slow machine is given as long as it takes
    assert [part for part, found in results.items() if not found] == []
    assert [each for found in results.values() for each in found if "error" in each or "skipped" in each] == []
    assert code == 0
    assert all(each["env_steps_per_second"] > 0 for part in ("rollouts", "replay", "pong") for each in results[part])
    assert {each["replay"] for each in results["learner"]} == {"uniform", "prioritised"}
    (profiled,) = (each for each in results["pong"] if each["profile"])
    assert sum(profiled[part] for part in ("environment", "transfer", "inference", "replay", "update", "other")) == (
        pytest.approx(1, abs=0.01)
    )
    (tests,) = results["tests"]
    assert tests["tests"] > 0 and tests["skipped_tests"] == 0
    assert results["train-breakout"][-1]["stopped"] == "return reached"
    assert results["train-pong"][-1]["best_eval_return"] >= -21
    assert "env_steps_per_second" in output.splitlines()[-2]  # the table, at the end


@pytest.mark.parametrize("failure", FAILING_IMPORTS)
def test_a_part_that_fails_is_an_error_and_the_others_are_measured_all_the_same(failure, tmp_path):
    (tmp_path / "ale_py.py").write_text(FAILING_IMPORTS[failure])
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    parts = ("pong", "mesh")
    code, results, _ = run("--seconds", "100000", "--parts", *parts, PYTHONPATH=path)
    assert code == 1
    assert results["pong"] and all("error" in each for each in results["pong"])
    assert results["mesh"] and "error" not in results["mesh"][0]


def test_what_there_is_no_time_for_is_skipped():
    code, results, _ = run("--seconds", "1")
    assert code == 0
    assert all(found == [{"part": part, "skipped": "not enough time left"}] for part, found in results.items())
