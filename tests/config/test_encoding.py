import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import qfleet
from qfleet.config import (
    TOPOLOGIES,
    ActorLearnerConfig,
    AllReduceConfig,
    ConfigError,
    FusedConfig,
    GossipConfig,
    MeshConfig,
    OverlappedConfig,
    ParameterServerConfig,
    TrainConfig,
)
from qfleet.config.encoding import SCHEMA_VERSION, decode, encode
from qfleet.runtime.run_directory import RunDirectory

DATA = Path(__file__).resolve().parents[1] / "data"

AS_RUN = [
    FusedConfig(num_envs=8, mesh=MeshConfig(data=2)),
    OverlappedConfig(num_env_workers=2, profile=True),
    AllReduceConfig(num_processes=4, coordinator="host:1", process_id=2),
    GossipConfig(num_processes=4, gossip_period_learner_steps=7, lock_step=True),
    ActorLearnerConfig(
        num_actors=3, actor_resources={"CPU": 2.0}, actor_epsilon_base=0.3, ray_address="auto",
        actor_node_labels={"market": "in(spot,preemptible)"},
    ),
    ParameterServerConfig(num_workers=3, max_loss_deviations=None, gradient_dtype="bfloat16"),
]  # fmt: skip


def test_the_tests_below_cover_every_topology():
    assert {topology.name for topology in AS_RUN} == set(TOPOLOGIES)


@pytest.mark.parametrize("topology", AS_RUN, ids=lambda topology: topology.name)
def test_a_config_comes_back_from_json(topology):
    config = dataclasses.replace(
        qfleet.make_config("CartPole-v1", "double_dqn", env_steps=96_000, batch_size=96), topology=topology
    )
    assert decode(json.loads(json.dumps(encode(config)))) == config


def v1(topology: dict) -> dict:
    """Returns a run's config as the first version wrote it, without the topology's name."""
    run = v3(qfleet.make_config("CartPole-v1", "double_dqn"))
    return json.loads(json.dumps({**run, "topology": topology}))


def v3(config: TrainConfig) -> dict:
    """Returns a run's config as the third version wrote it, when importance weights were never normalised."""
    content = v4(config)
    del content["agent"]["importance_normalisation"]
    return content


def v4(config: TrainConfig) -> dict:
    """Returns a run's config as the fourth version wrote it, when runs wrote no reports."""
    content = v5(config)
    del content["report"]
    return content


def v7(config: TrainConfig) -> dict:
    """Returns a run's config as the seventh version wrote it, when all actors computed the first priorities."""
    content = json.loads(json.dumps(encode(config)))
    content["topology"].pop("initial_priorities", None)
    return content


def v6(config: TrainConfig) -> dict:
    """Returns a run's config as the sixth version wrote it, when no process chose its node."""
    content = v7(config)
    topology = content["topology"]
    return {**content, "topology": {name: topology[name] for name in topology if not name.endswith("_node_labels")}}


def v5(config: TrainConfig) -> dict:
    """Returns a run's config as the fifth version wrote it, when all values were scalars."""
    content = v6(config)
    for name in ADDED_IN_6:
        del content["agent"][name]
    return content


ADDED_IN_6 = (
    "head", "num_atoms", "value_min", "value_max", "hl_gauss_smoothing", "num_quantiles", "num_acting_quantiles",
    "num_cosines", "munchausen", "munchausen_temperature", "munchausen_weight", "munchausen_clip", "noisy", "noisy_std",
    "exploration_fraction", "learning_rate_fraction", "importance_exponent_fraction",
    "network", "target", "own_options", "normalise_observations", "normalise_rewards",
)  # fmt: skip


LANES = {"num_workers": 1, "step_timeout_seconds": 60.0, "max_failures": 10}
DECENTRALISED = {
    **LANES, "lock_step": False, "num_envs": 16, "num_processes": 2, "gossip_period_learner_steps": 50,
    "devices_per_process": 1, "coordinator": None, "process_id": None, "ray_address": None,
    "peer_timeout_seconds": 30.0, "max_restarts": 3,
}  # fmt: skip
ON_RAY = {"ray_address": "local", "silence_seconds": 90.0, "max_restarts": 5}
MESH = {"data": 1, "model": 1}


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"num_envs": 16, "mesh": MESH}, FusedConfig(num_envs=16)),
        (
            {**LANES, "lock_step": True, "num_envs": 8, "mesh": MESH, "profile": False},
            OverlappedConfig(num_env_workers=1, lock_step=True),
        ),
        (
            {**DECENTRALISED, "exchange": "all-reduce"},
            AllReduceConfig(num_env_workers=1, num_envs=16, silence_seconds=30.0),
        ),
        (
            {**DECENTRALISED, "exchange": "gossip"},
            GossipConfig(num_env_workers=1, num_envs=16, silence_seconds=30.0, gossip_period_learner_steps=50),
        ),
        (
            {
                **LANES, **ON_RAY, "num_actors": 2, "lanes_per_actor": 4, "num_replay_shards": 1, "rows_per_chunk": 32,
                "broadcast_period_learner_steps": 100, "ladder_base": 0.5, "ladder_exponent": 3.0, "mesh": MESH,
                "actor_resources": {}, "learner_resources": {},
            },
            ActorLearnerConfig(num_actors=2, num_env_workers=1, actor_epsilon_base=0.5, actor_epsilon_exponent=3.0),
        ),
        (
            {
                **ON_RAY, "num_workers": 2, "lanes_per_worker": 4, "num_server_shards": 1, "num_replay_shards": 0,
                "rows_per_chunk": 16, "max_staleness": 16, "gradients_per_learner_step": 1, "max_loss_deviations": 10.0,
                "gradient_dtype": "float32", "snapshot_period_learner_steps": 200, "max_failures": 10,
                "worker_resources": {},
            },
            ParameterServerConfig(num_workers=2),
        ),
    ],
    ids=["fused", "overlapped", "all-reduce", "gossip", "actor-learner", "parameter-server"],
)  # fmt: skip
def test_configs_that_the_first_version_wrote_are_read(old, expected):
    assert decode(v1(old), schema_version=1).topology == expected


def test_evaluations_of_a_run_of_the_second_version_stay_strictly_greedy():
    config = qfleet.TrainConfig(env="CartPole-v1")
    old = {name: value for name, value in v3(config).items() if not name.startswith(("eval_ex", "eval_max"))}
    assert decode(old, schema_version=2) == config
    with pytest.raises(ConfigError, match=r"missing \['eval_exploration', 'eval_max_episode_steps', 'report'\]"):
        decode(old)


def test_importance_weights_of_a_run_of_the_third_version_stay_as_they_were():
    config = qfleet.make_config("CartPole-v1", "rainbow_lite")
    assert config.agent.importance_normalisation == "none"
    assert decode(v3(config), schema_version=3) == config
    with pytest.raises(ConfigError, match=r"config.agent must have .* missing .*'importance_normalisation'"):
        decode({**v3(config), "report": True})


def test_a_run_of_the_fourth_version_is_read_and_writes_a_report_once_it_is_resumed():
    config = qfleet.make_config("CartPole-v1", "dqn")
    assert config.report
    assert decode(v4(config), schema_version=4) == config


def test_a_run_of_the_fifth_version_keeps_its_scalar_values():
    config = qfleet.make_config("CartPole-v1", "rainbow_lite")
    assert decode(v5(config), schema_version=5) == config
    assert config.agent.head == "scalar" and not config.agent.noisy and not config.agent.munchausen


@pytest.mark.parametrize("topology", [kind() for kind in TOPOLOGIES.values()], ids=lambda topology: topology.name)
def test_processes_of_a_run_of_the_sixth_version_go_to_any_node(topology):
    config = dataclasses.replace(qfleet.make_config("CartPole-v1", "double_dqn"), topology=topology)
    assert decode(v6(config), schema_version=6) == config
    if topology.name not in ("fused", "overlapped"):
        with pytest.raises(ConfigError, match=r"config.topology must have .* missing .*_node_labels'"):
            decode(v6(config))


def test_actors_of_a_run_of_the_seventh_version_compute_the_first_priorities():
    config = dataclasses.replace(qfleet.make_config("CartPole-v1", "rainbow_lite"), topology=ActorLearnerConfig())
    assert decode(v7(config), schema_version=7) == config
    with pytest.raises(ConfigError, match=r"config.topology must have .* missing \['initial_priorities'\]"):
        decode(v7(config))


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "2"])
def test_a_version_that_is_not_known_is_refused(version):
    with pytest.raises(ConfigError, match=f"schema_version must be 1 to {SCHEMA_VERSION}, got"):
        decode(v1({}), schema_version=version)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"name": "fused"}, "missing .'mesh', 'num_envs'."),
        ({"name": "fusd", "num_envs": 8}, "config.topology must have a name, one of fused, overlapped"),
        ({"name": "fused", "num_envs": 0, "mesh": MESH}, "num_envs must be a whole number, at least 1, got 0"),
        (None, "config.topology must have a name"),
    ],
)
def test_an_invalid_topology_is_refused(topology, message):
    content = {**v1({}), "topology": topology}
    with pytest.raises(ConfigError, match=message):
        decode(content, schema_version=3)


@pytest.fixture
def old_run(tmp_path) -> Path:
    """The folder of an overlapped run with two environment workers, as the first version left it."""
    with tarfile.open(DATA / "overlapped_run_of_schema_1.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def test_a_folder_of_the_first_version_still_gives_its_policy(old_run):
    config = RunDirectory.open(old_run).config
    assert config.topology == OverlappedConfig(num_env_workers=2, lock_step=True)
    values = qfleet.load(old_run).q_values(np.array([[0.5, -1, 0.2, 1.5], [-2, 1, 0, -3]], np.float32))
    np.testing.assert_allclose(values, [[-0.33472, 0.10989], [-2.05486, 0.19002]], atol=1e-4)


def test_a_run_of_the_first_version_can_be_resumed(old_run):
    run = qfleet.resume(old_run, env_steps=2_048, topology=OverlappedConfig(lock_step=True))
    assert [progress.env_steps > 1_024 for progress in run] and run.summary["env_steps"] == 2_048
