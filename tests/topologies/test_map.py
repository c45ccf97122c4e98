"""The maps in the docstrings of `qfleet.topologies` and its packages are true: every name in them exists."""

import importlib
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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


class Step(NamedTuple):
    """A row of the table that a package opens with: from the environment to new parameters."""

    text: str
    decided_by: str
    function: str
    file: str


TABLES = {"fused": "topology", "overlapped": "topology", "actor_learner": "machine", "parameter_server": "machine"}
"""Packages that open with such a table, each with the module that decides."""

MOST_FILES = {"fused": 11, "overlapped": 10, "actor_learner": 12, "parameter_server": 15}
"""Files of each table, with the package's `__init__`. A path through more of them is hard to follow."""


def steps_of(package: str) -> list[Step]:
    """Returns the rows of a package's table."""
    lines = (importlib.import_module(f"qfleet.topologies.{package}").__doc__ or "").splitlines()
    rule = next(i for i, line in enumerate(lines) if line.strip().startswith("---"))
    starts = [match.start() for match in re.finditer("-+", lines[rule])]
    rows = itertools.takewhile(str.strip, lines[rule + 1 :])
    bounds = list(itertools.pairwise([*starts, None]))
    return [Step(*(row[start:end].strip() for start, end in bounds)) for row in rows]


def module_of(package: str, file: str) -> ModuleType:
    """Returns the one module that a file of a table stands for."""
    found = []
    for prefix in (f"topologies/{package}", "topologies", ""):
        path = Path(prefix, file)
        if (Path(topologies.__file__).parents[1] / path).is_file():
            found.append(".".join(("qfleet", *path.with_suffix("").parts)))
    assert len(found) == 1, (file, found)
    return importlib.import_module(found[0])


@pytest.mark.parametrize("package", TABLES)
def test_every_function_of_a_package_s_table_is_in_its_file(package: str) -> None:
    steps = steps_of(package)
    assert len(steps) > 10
    for step in steps:
        found: Any = module_of(package, step.file)
        for part in step.function.split("."):
            found = getattr(found, part)
    assert len({step.file for step in steps}) + 1 <= MOST_FILES[package]


@pytest.mark.parametrize("package", TABLES)
def test_who_decides_in_a_package_s_table_exists(package: str) -> None:
    """Requests by their names, and methods of the machine or of its parts."""
    steps = steps_of(package)
    modules = [module_of(package, file) for file in {f"{TABLES[package]}.py", *(step.file for step in steps)}]
    known = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    kinds = {kind.__name__: kind for kind in known if kind.__module__.startswith("qfleet")}
    for step in steps:
        for name in re.findall(r"[\w.]+", step.decided_by):
            if name.startswith("_"):
                assert any(hasattr(kind, name) for kind in kinds.values()), name
            elif name[0].isupper():
                kind, _, method = name.partition(".")
                assert hasattr(kinds[kind], method or "__init__") or method in kinds[kind].__annotations__, name


def test_a_request_has_the_name_of_the_remote_method_and_of_the_plain_one() -> None:
    """`SetPriorities` is `set_priorities`. Where the class says what is meant, the verb is enough: `RestoreReplay`."""
    pytest.importorskip("ray")
    for package in ("actor_learner", "gossip"):
        importlib.import_module(f"qfleet.topologies.{package}.machine")  # has requests
    from qfleet.topologies.actor_learner.learner import GlobalLearner
    from qfleet.topologies.actor_learner.remote import RemoteActor, RemoteLearner
    from qfleet.topologies.fleet.actor import Actor
    from qfleet.topologies.fleet.messages import CallRequest
    from qfleet.topologies.fleet.remote import RemoteReplayShard
    from qfleet.topologies.fleet.replay_shard import ReplayShard
    from qfleet.topologies.gossip.peer import GossipPeer
    from qfleet.topologies.gossip.remote import RemotePeer
    from qfleet.topologies.parameter_server.remote import RemoteServerShard, RemoteWorker
    from qfleet.topologies.parameter_server.server_shard import ServerShard
    from qfleet.topologies.parameter_server.worker import Worker

    pairs = [
        (RemoteActor, Actor), (RemoteLearner, GlobalLearner), (RemoteReplayShard, ReplayShard),
        (RemoteWorker, Worker), (RemoteServerShard, ServerShard), (RemotePeer, GossipPeer),
    ]  # fmt: skip
    requests = {kind.__name__ for kind in CallRequest.__subclasses__() if kind.__module__.startswith("qfleet")}
    assert len(requests) > 12
    for request in requests:
        words = re.findall("[A-Z][a-z]+", request)
        names = {"_".join(words).lower(), words[0].lower()}
        assert any(hasattr(remote, name) and hasattr(plain, name) for remote, plain in pairs for name in names), request
