"""Every example that needs an extra runs."""

import re
from pathlib import Path

import pytest
from started_examples import EXAMPLES, NEEDS, expect_to_run

SLOW = {"laptop_fleet.py"}


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(NEEDS)]
)
def test_an_example_runs(example: str, tmp_path: Path) -> None:
    expect_to_run(example, tmp_path)


def test_rays_launcher_accepts_the_cluster_file() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    yaml = pytest.importorskip("yaml")
    text = (EXAMPLES / "cluster.yaml").read_text()
    util.validate_config(util.prepare_config(yaml.safe_load(text)))
    other_types = yaml.safe_load(re.sub(r"^# ?", "", text[text.index("# head_node_type") :], flags=re.MULTILINE))
    assert other_types["head_node_type"] in other_types["available_node_types"]
