"""Processes go to the nodes whose labels they ask for, on a Ray cluster of two nodes."""

from collections.abc import Iterator
from typing import Any

import pytest
import small_fleets
from other_processes import wait_until

import qfleet
from qfleet.config import AllReduceConfig, ConfigError
from qfleet.config.node_labels import has_labels

ray = pytest.importorskip("ray")

from qfleet.topologies.all_reduce.ray_processes import groups_on_ray  # noqa: E402
from qfleet.topologies.fleet import cluster as connection  # noqa: E402
from qfleet.topologies.fleet import director  # noqa: E402
from qfleet.topologies.fleet.ray_internals import on_loopback  # noqa: E402
from qfleet.topologies.fleet.remote_process import InRemoteProcess, RemoteProcess  # noqa: E402

OWN = {"market": "spot", "example.com/zone": "a"}
"""Labels of one of the two nodes. The other has only those that Ray gives to every node."""


@pytest.fixture(scope="module")
def labelled() -> Iterator[str]:
    """Connects to a cluster of two nodes with 4 CPUs each, and yields the ID of the one that has labels."""
    from ray.cluster_utils import Cluster

    with on_loopback(), connection.process_kept_as_it_is():
        cluster = Cluster()
        cluster.add_node(num_cpus=4, include_dashboard=False)
        cluster.add_node(num_cpus=4, labels=OWN)
        connection._init({"address": cluster.address, "log_to_driver": False})
    yield next(node["NodeID"] for node in ray.nodes() if node["Labels"].get("market"))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_each_process_of_a_run_is_on_a_node_with_its_labels(labelled, tmp_path, caplog):
    config = small_fleets.config_of(
        num_actors=2, num_replay_shards=1, ray_address="auto", env_steps=256, run_dir=str(tmp_path / "run"),
        actor_node_labels={"market": "in(on-demand,spot)", "example.com/zone": "a"},
        learner_node_labels={"market": "!spot"}, replay_node_labels={"market": "!in(on-demand,spot)"},
    )  # fmt: skip
    run = qfleet.iterate(config)
    found: Any = run._topology._director
    wait_until(lambda: found.num_ready_actors == 2)
    nodes = {process.name: process.place[1] == labelled for process in found._processes.values()}
    assert nodes == {"learner": False, "replay shard 0": False, "actor 0": True, "actor 1": True}
    for _ in run:
        pass
    assert run.summary["env_steps"] == 256 and "no node of the Ray cluster" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "is_met"),
    [
        ("spot", True), ("!spot", False), ("in(other,spot)", True), ("!in(other,spot)", False), ("other", False),
    ],
)  # fmt: skip
def test_ray_reads_rules_as_we_do(labelled, rule, is_met):
    """The node without the label can only be found by a rule that begins with an exclamation mark."""
    nodes = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    suiting = {node for node, labels in nodes.items() if has_labels(labels, {"market": rule})}
    assert suiting == ({labelled} if is_met else set()) | (set(nodes) - {labelled} if rule.startswith("!") else set())

    process = RemoteProcess("one", InRemoteProcess, (), {"CPU": 1}, {}, list, labels={"market": rule})
    process.start(0.0)
    try:
        place = process.handle.where.remote()
        if suiting:
            assert ray.get(place)[1] in suiting
        else:
            assert ray.wait([place], timeout=1)[0] == []
    finally:
        process.terminate()


@pytest.mark.slow
def test_a_run_that_asks_for_a_label_nobody_has_says_so_and_is_refused(labelled, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(director, "_PATIENCE", 1)
    config = small_fleets.config_of(
        ray_address="auto", silence_seconds=5.0, learner_node_labels={"market": "reserved"}, run_dir=str(tmp_path / "a")
    )
    refusal = (
        r"got none for learner with 1 CPU and label market=reserved in 5 s, . CPU free of 8 CPU, and 0 of 2 nodes with "
        r"label market=reserved; add nodes, or give .*, or other labels"
    )
    with pytest.raises(ConfigError, match=refusal):
        qfleet.train(config)
    assert "no node of the Ray cluster has label market=reserved yet, which learner_node_labels asks" in caplog.text


@pytest.mark.slow
def test_equal_processes_are_on_nodes_with_their_labels_or_refused(labelled, tmp_path, caplog):
    settings: dict[str, Any] = {"ray_address": "auto", "silence_seconds": 5.0}
    config = AllReduceConfig(**settings, process_node_labels=OWN)
    wait_until(lambda: ray.available_resources().get("CPU") == 8)  # those of the tests before have gone
    with groups_on_ray(config, lambda info: [], tmp_path) as make_group:
        group: Any = make_group()
        group._reserve(lambda: False)
        table = ray.util.placement_group_table(group._reserved)
        assert set(table["bundles_to_node_id"].values()) == {labelled}
        group.kill()
    config = AllReduceConfig(**settings, process_node_labels={"market": "reserved"})
    refusal = r"2 times 1 CPU and label market=reserved, got .* 0 of 2 nodes with .*, or other labels"
    with groups_on_ray(config, lambda info: [], tmp_path) as make_group:
        group = make_group()
        with pytest.raises(ConfigError, match=refusal):
            group.start(lambda: False)
        group.kill()
    assert "which process_node_labels asks for; waiting for one" in caplog.text
