"""The map in the docstring of `qfleet.topologies` is true: every name in it exists, and every topology has its rows."""

import importlib
import re
from typing import Any

import pytest

from qfleet import topologies
from qfleet.config import TOPOLOGIES

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (topologies.__doc__ or "").splitlines()
    if line.startswith("| ") and not line.startswith("| topology")
]
NAMES = sorted(set(re.findall(r"\b[a-z_]+(?:\.\w+)+", topologies.__doc__ or "")) - {"qfleet.core"})


def resolve(name: str) -> Any:
    """Returns what a dotted name in `qfleet` stands for: a module, or something in one."""
    parts = ["qfleet", *name.split(".")]
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[i:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_map_exists(name: str) -> None:
    assert resolve(name) is not None


def test_a_name_that_does_not_exist_is_found() -> None:
    with pytest.raises(AttributeError):
        resolve("topologies.fleet.actor.Actress")


def test_every_topology_has_a_row_in_both_tables_and_no_cell_of_the_first_is_empty() -> None:
    expected = {name.replace("-", "_") for name in TOPOLOGIES}
    who, borders = [row for row in ROWS if len(row) == 5], [row for row in ROWS if len(row) == 2]
    assert {row[0] for row in who} == {row[0] for row in borders} == expected
    assert all(all(row) for row in who)


@pytest.mark.parametrize("package", [*(name.replace("-", "_") for name in TOPOLOGIES), "fleet"])
def test_every_package_opens_with_its_data_flow(package: str) -> None:
    text = importlib.import_module(f"qfleet.topologies.{package}").__doc__ or ""
    assert "--" in text and len(text.splitlines()) > 15
