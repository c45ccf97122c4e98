"""Every example runs; those that need an extra are in `test_examples_of_extras`."""

from pathlib import Path

import pytest
from started_examples import BUDGETS, EXAMPLES, NEEDS, expect_to_run


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(BUDGETS)


@pytest.mark.parametrize("example", sorted(set(BUDGETS) - set(NEEDS)))
def test_an_example_runs(example: str, tmp_path: Path) -> None:
    expect_to_run(example, tmp_path)
