"""How many seeds are trained at once, and what each of their processes may use. No process is started."""

import dataclasses
from typing import Any

import pytest

import qfleet
from qfleet.config import ConfigError, TrainConfig
from qfleet.training import seed_places
from qfleet.training.seed_places import make_places


@pytest.fixture(autouse=True)
def _a_machine_of_8_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_places, "num_cores", lambda: 8)
    monkeypatch.setattr(seed_places, "available_bytes", lambda devices: 10**12)
    for name in ("PJRT_NPROC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def make(topology: str = "overlapped", num_seeds: int = 20, **settings: Any) -> TrainConfig:
    sizes = {} if "num_actors" in settings or "num_workers" in settings else {"num_envs": 8}
    return qfleet.make_config("gym:CartPole-v1", "dqn", topology, num_seeds=num_seeds, **sizes, **settings)


@pytest.mark.parametrize(
    ("topology", "settings", "count"),
    [
        ("overlapped", {}, 8),
        ("overlapped", {"num_seeds": 3}, 3),
        ("overlapped", {"num_env_workers": 3}, 2),
        ("overlapped", {"num_env_workers": 8}, 1),
        ("all-reduce", {"num_processes": 4}, 2),
    ],
)
def test_as_many_as_the_cores_allow(topology: str, settings: dict[str, Any], count: int) -> None:
    places = make_places(make(topology, **settings), None)
    assert places.num_at_once == count
    assert ("busy, and this machine has 8 cores" in places.reason) == (count != settings.get("num_seeds"))


@pytest.mark.parametrize(
    ("topology", "settings", "busy"),
    [
        ("actor-learner", {"num_actors": 3, "num_replay_shards": 2}, 6),
        ("parameter-server", {"num_workers": 3, "num_server_shards": 2}, 5),
        ("gossip", {"num_processes": 2, "devices_per_process": 2}, 4),
    ],
)
def test_the_processes_of_a_fleet_count(topology: str, settings: dict[str, Any], busy: int) -> None:
    assert make(topology, **settings).topology.num_busy_processes == busy


def test_seeds_in_a_ray_cluster_that_is_shared_come_one_after_the_other() -> None:
    pytest.importorskip("ray")
    places = make_places(make("gossip", ray_address="host:1234"), None)
    assert (places.num_at_once, places.reason) == (1, "because each takes what the Ray cluster has")


def test_no_more_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_places(make(), None)
    assert one.num_at_once == 8
    monkeypatch.setattr(seed_places, "check_fits", lambda *arguments: None)
    monkeypatch.setattr(seed_places, "available_bytes", lambda devices: 1)
    places = make_places(make(), None)
    assert (places.num_at_once, places.reason) == (1, "because no more fit into this machine's memory")


def test_processes_share_the_cores_and_a_single_one_has_them_all() -> None:
    both = make_places(make(hidden_sizes=(512, 512)), 2).environments
    assert both[0]["OMP_NUM_THREADS"] == both[1]["OMP_NUM_THREADS"]
    (alone,) = make_places(make(hidden_sizes=(512, 512)), 1).environments
    assert "OMP_NUM_THREADS" not in alone


@pytest.mark.parametrize(
    ("num_at_once", "mesh", "seen", "memory"),
    [
        (None, 1, ["3", "5"], None),
        (None, 2, ["3,5"], None),
        (4, 1, ["3", "5", "3", "5"], "0.450"),
        (1, 4, ["3,5"], None),
    ],
)
def test_each_process_has_gpus_of_its_own_or_a_share_of_their_memory(
    num_at_once: int | None, mesh: int, seen: list[str], memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seed_places, "visible_gpus", lambda: ["3", "5"])
    places = make_places(make(mesh=qfleet.config.MeshConfig(data=mesh)), num_at_once)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in places.environments] == seen
    assert places.environments[0].get("XLA_PYTHON_CLIENT_MEM_FRACTION") == memory


def test_the_cpu_is_divided_before_anything_else_may_start_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """`footprint` does that for the processes of all-reduce. Once JAX has started, it would be too late."""
    order = []
    for name in ("footprint", "make_env_and_network"):
        function = getattr(seed_places, name)
        monkeypatch.setattr(
            seed_places, name, lambda *given, name=name, function=function: (order.append(name), function(*given))[1]
        )
    make_places(make("all-reduce", num_processes=2), None)
    assert order == ["footprint", "make_env_and_network"]


def test_an_environment_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean CartPole-v1"):
        make_places(dataclasses.replace(make(), env="CartPol-v1"), None)
