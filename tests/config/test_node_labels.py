import pytest

import qfleet
from qfleet.cli import resume_command
from qfleet.cli.topology_flags import topology_with
from qfleet.cli.train_command import parse
from qfleet.config import ActorLearnerConfig, AllReduceConfig, ConfigError
from qfleet.config.node_labels import has_labels, node_labels


def labels_of(topology="actor-learner", **settings):
    """Returns the labels of a run on a cluster with these settings, by setting."""
    settings = {"ray_address": "auto", **settings}
    return node_labels(qfleet.make_config("CartPole-v1", "double_dqn", topology, **settings).topology)


@pytest.mark.parametrize(
    ("topology", "settings"),
    [
        ("actor-learner", ["learner_node_labels", "actor_node_labels", "replay_node_labels"]),
        ("parameter-server", ["server_node_labels", "worker_node_labels"]),
        ("gossip", ["process_node_labels"]),
        ("all-reduce", ["process_node_labels"]),
    ],
)
def test_every_kind_of_process_chooses_its_nodes(topology, settings):
    for setting in settings:
        assert labels_of(topology, **{setting: {"zone": "a"}}) == {setting: {"zone": "a"}}
    assert labels_of(topology) == {}


@pytest.mark.parametrize("rule", ["spot", "!spot", "in(spot)", "in(a,b)", "!in(a,b)", "in", "a.b_c-d", "8"])
@pytest.mark.parametrize("label", ["zone", "ray.io/accelerator-type", "example.com/a_b.c", "8"])
def test_labels_and_rules_are_those_of_ray(label, rule):
    assert labels_of(learner_node_labels={label: rule}) == {"learner_node_labels": {label: rule}}
    utils = pytest.importorskip("ray._private.label_utils")
    assert utils.validate_label_selector({label: rule}) is None


@pytest.mark.parametrize(
    "rule", ["", "a b", "-a", "a-", "in()", "in(a", "in(a,,b)", "in(a, b)", "!!a", "a,b", "a=b", "ä", "a" * 64]
)
def test_a_rule_that_ray_could_not_read_is_refused(rule):
    message = r"learner_node_labels\[zone\] must be VALUE, !VALUE, in\(VALUE,VALUE\) or .* no spaces, got"
    with pytest.raises(ConfigError, match=message):
        labels_of(learner_node_labels={"zone": rule})


@pytest.mark.parametrize(
    "label", ["", "a b", "/a", "a/", "a/b/c", "-a/b", "a..b/c", "zone=a", "a" * 64, "a." * 127 + "a/b"]
)
def test_a_label_that_no_node_can_have_is_refused(label):
    with pytest.raises(ConfigError, match="actor_node_labels must be labels whose names are as in Kubernetes"):
        labels_of(actor_node_labels={label: "a"})


@pytest.mark.parametrize(
    ("topology", "settings", "message"),
    [
        ("actor-learner", {"ray_address": "local"}, "must be empty, or given with .* got ray_address local"),
        ("all-reduce", {"ray_address": None}, "must be empty, or given with .* got ray_address None"),
        ("gossip", {"process_node_labels": ["zone"]}, r"must be a mapping of names to text, got \['zone'\]"),
        ("gossip", {"process_node_labels": {"zone": 1}}, r"process_node_labels\[zone\] must be text, got 1"),
        ("fused", {}, "must come with topology all-reduce or gossip, got topology fused"),
        (
            "parameter-server", {"replay_node_labels": {"zone": "a"}, "num_replay_shards": 0},
            r"replay_node_labels must be left out with num_replay_shards=0, .* got {'zone': 'a'}",
        ),
    ],
)  # fmt: skip
def test_labels_that_would_have_no_effect_or_are_none_are_refused(topology, settings, message):
    names = {"actor-learner": "learner_node_labels", "parameter-server": "worker_node_labels"}
    name = names.get(topology, "process_node_labels")
    given = {"ray_address": "auto", name: {"zone": "a"}, **settings}
    if topology == "fused":
        del given["ray_address"]
    with pytest.raises(ConfigError, match=message):
        qfleet.make_config("CartPole-v1", "double_dqn", topology, **given)


def test_flags_give_labels_in_pairs_and_an_empty_flag_gives_none():
    fleet = ["CartPole-v1", "--topology", "actor-learner", "--ray-address", "auto"]
    topology = parse(
        [*fleet, "--learner-node-labels", "market", "!spot", "zone", "8", "--actor-node-labels"]
    ).config.topology
    assert topology.learner_node_labels == {"market": "!spot", "zone": "8"}, "values stay text"
    assert topology.actor_node_labels == {}


def test_a_run_of_one_machine_goes_on_with_labels_on_a_cluster_and_the_other_way_round():
    _, given = resume_command.parse(["RUN", "--ray-address", "auto", "--actor-node-labels", "zone", "a"])
    topology = topology_with(ActorLearnerConfig(), given)
    assert topology.actor_node_labels == {"zone": "a"} and topology.ray_address == "auto"
    flags, given = resume_command.parse(["RUN", "--ray-address", "local", "--actor-node-labels"])
    assert topology_with(topology, given).with_processes({"ray_address": flags.ray_address}) == ActorLearnerConfig()
    with pytest.raises(ConfigError, match="actor_node_labels must be empty"):
        topology.with_processes({"ray_address": "local"})
    equal = AllReduceConfig(ray_address="auto", process_node_labels={"zone": "a"})
    for changes in ({"coordinator": "local"}, {"coordinator": "host:1", "process_id": 0}):
        assert equal.with_processes(changes).process_node_labels == {}


@pytest.mark.parametrize(
    ("labels", "wanted", "expected"),
    [
        ({"zone": "a"}, {}, True),
        ({"zone": "a"}, {"zone": "a"}, True),
        ({"zone": "a"}, {"zone": "b"}, False),
        ({}, {"zone": "a"}, False),
        ({"zone": "a"}, {"zone": "!a"}, False),
        ({}, {"zone": "!a"}, True),
        ({"zone": "b"}, {"zone": "in(a,b)"}, True),
        ({"zone": "c"}, {"zone": "in(a,b)"}, False),
        ({"zone": "b"}, {"zone": "!in(a,b)"}, False),
        ({}, {"zone": "!in(a,b)"}, True),
        ({"zone": "a"}, {"zone": "a", "market": "spot"}, False),
        ({"zone": "a", "market": "spot"}, {"zone": "a", "market": "spot"}, True),
    ],
)
def test_a_node_suits_if_it_has_all_that_is_asked_for(labels, wanted, expected):
    assert has_labels(labels, wanted) is expected
