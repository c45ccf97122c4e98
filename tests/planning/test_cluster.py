"""A file describes nodes, and each process of a run finds its place among them."""

import json
from pathlib import Path

import pytest

from qfleet.config import ConfigError
from qfleet.planning.cluster import Cluster, NodeGroup, check_factors, read_cluster

TOML = """
[[nodes]]
name = "head"
cores = 4
roles = ["director", "learner"]

[[nodes]]
count = 2
cores = 2
speed = 0.5
gigabits_per_second = 1
roles = ["actor"]

[network]
latency_milliseconds = 0.2
call_milliseconds = 1

[failures]
lost_per_process_hour = 0.1
restart_seconds = 5

[costs]
learn = 0.1
"""

EXPECTED = Cluster(
    groups=(
        NodeGroup(name="head", cores=4.0, roles=("director", "learner")),
        NodeGroup(count=2, cores=2.0, speed=0.5, gigabits_per_second=1.0, roles=("actor",)),
    ),
    latency_seconds=0.0002,
    call_seconds=0.001,
    lost_per_process_hour=0.1,
    restart_seconds=5.0,
    factors={"learn": 0.1},
)


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(TOML)
    found = read_cluster(str(tmp_path / "cluster.toml"))
    assert found == EXPECTED
    assert (found.num_nodes, found.num_cores) == (3, 8.0)


def test_json_will_do(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"nodes": [{"cores": 3}]}))
    assert read_cluster(str(path)) == Cluster(groups=(NodeGroup(cores=3.0),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have at least one table"),
        ("nodes = 3", "must have at least one table"),
        ("[[nodes]\n", "must be TOML"),
        (f"nodes = {1000 * '['}{1000 * ']'}", "must be TOML, got an error in it .*nested too deeply"),
        ("# " + 2**20 * "x", "must be a file that can be read, got .* at most 1,048,576 bytes"),
        ("[[nodes]]\ncores = 0", r"nodes\[0\].cores must be a number above 0, got 0"),
        ("[[nodes]]\ncores = true", r"nodes\[0\].cores must be a number above 0, got True"),
        ("[[nodes]]\ncount = 1.5", r"nodes\[0\].count must be a whole number from 1, got 1.5"),
        ("[[nodes]]\ncors = 2", r"must have only keys among .*cores.*got 'cors'"),
        ("[[nodes]]\nroles = ['pilot']", "must be a list of roles among director"),
        ("[[nodes]]\ncount = 1000000", "must describe at most 20000 nodes, got 1000000"),
        ("[[nodes]]\n[failures]\nrestart_seconds = -1", "failures.restart_seconds must be a number from 0, got -1"),
        (
            "[[nodes]]\n[failures]\nlost_per_process_hour = 1e11\nrestart_seconds = 1e11",
            "must live for longer than its replacement takes to start, got 1e.11 losses per hour and 1e.11 seconds",
        ),
        ("[[nodes]]\n[network]\nlatency = 1", "network must have only keys among latency_milliseconds"),
        ("[[nodes]]\n[costs]\nlearn = nan", "costs.learn must be a number above 0, got nan"),
        ("network = 1\n[[nodes]]", "network must be a table, got 1"),
    ],
)
def test_what_is_no_cluster_gets_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_cluster(str(tmp_path / "cluster.toml"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml .*check the path"):
        read_cluster("nowhere.toml")


def test_factors_are_of_parts_that_there_are() -> None:
    check_factors({"learn": 2.0}, ["learn", "insert", "memory"])
    with pytest.raises(ConfigError, match="must have only keys among learn, insert, got 'lern'"):
        check_factors({"lern": 2.0}, ["learn", "insert", "memory"])


def test_processes_are_placed_by_their_roles() -> None:
    processes = [("director", -1), ("learner", -1), *(("actor", i) for i in range(4))]
    places = EXPECTED.place(processes)
    assert [places[each] for each in processes] == [0, 0, 1, 2, 1, 2]


def test_a_process_without_a_core_is_refused() -> None:
    with pytest.raises(ConfigError, match="none left for actor 4 of 5 with 8 cores on 3 nodes; add nodes or cores"):
        EXPECTED.place([("actor", i) for i in range(5)])
    with pytest.raises(ConfigError, match="none left for director with 0.5 cores on 1 nodes"):
        Cluster(groups=(NodeGroup(cores=0.5),)).place([("director", -1)])
