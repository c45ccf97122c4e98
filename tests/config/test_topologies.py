import pytest

import qfleet
from qfleet.cli.topology_flags import replace_alias
from qfleet.config import TOPOLOGIES, AllReduceConfig, ConfigError, FusedConfig, GossipConfig, OverlappedConfig


def test_topologies_are_listed_by_their_names():
    assert all(kind.name == name for name, kind in TOPOLOGIES.items())
    assert list(TOPOLOGIES) == ["fused", "overlapped", "all-reduce", "gossip", "actor-learner", "parameter-server"]


@pytest.mark.parametrize(("exchange", "expected"), [({}, AllReduceConfig()), ({"exchange": "gossip"}, GossipConfig())])
def test_decentralised_is_an_earlier_name_of_two_topologies(exchange, expected):
    assert qfleet.make_config("CartPole-v1", "pqn", "decentralised", **exchange).topology == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("E --topology decentralised --seed 1", "E --seed 1 --topology all-reduce"),
        ("E --topology=decentralised --exchange=gossip", "E --topology gossip"),
        ("E --exchange gossip --topology decentralised --seed 1", "E --seed 1 --topology gossip"),
        ("E --topology fused --seed 1", "E --topology fused --seed 1"),
    ],
)
def test_the_command_line_replaces_the_earlier_name(arguments, expected):
    assert replace_alias(arguments.split()) == expected.split()


@pytest.mark.parametrize(
    ("topology", "settings", "message"),
    [
        ("decentralised", {"exchange": "gosip"}, "exchange must be all-reduce or gossip, got 'gosip'"),
        ("fused", {"exchange": "gossip"}, "exchange must come with topology decentralised, got fused"),
        ("overlapped", {"num_workers": 2}, "num_workers must be given by its new name .*; give num_env_workers"),
        ("gossip", {"peer_timeout_seconds": 9}, "peer_timeout_seconds must .*; give silence_seconds"),
        ("actor-learner", {"ladder_base": 0.3}, "ladder_base must .*; give actor_epsilon_base"),
        ("fused", {"ladder_base": 0.3}, "ladder_base must come with topology actor-learner, got topology fused"),
        ("fused", {"num_workers": 2}, "num_workers must come with topology parameter-server, got topology fused"),
        ("gossip", {"coordinator": "host:1"}, "coordinator must come with topology all-reduce, got topology gossip"),
        ("fusde", {}, "topology must be one of fused, .* Did you mean fused"),
    ],
)
def test_settings_of_another_topology_are_refused_with_the_remedy(topology, settings, message):
    with pytest.raises(ConfigError, match=message):
        qfleet.make_config("CartPole-v1", "double_dqn", topology, **settings)


def test_each_of_equal_processes_runs_the_topology_that_suits_the_environment():
    config = AllReduceConfig(num_envs=8, num_processes=2, devices_per_process=2, num_env_workers=3, lock_step=True)
    assert config.in_one_process("in-graph") == FusedConfig(num_envs=8, mesh=config.mesh)
    host = OverlappedConfig(num_envs=8, mesh=config.mesh, num_env_workers=3, lock_step=True)
    assert config.in_one_process("host") == host and config.mesh.data == 4


def test_a_config_of_another_topology_is_refused():
    with pytest.raises(TypeError, match="a run of topology gossip must have its config"):
        qfleet.make_config("CartPole-v1", "pqn").topology_as(GossipConfig)
