"""Settings of an all-reduce run that are refused, how a resumed run is started, and which GPUs each process sees."""

import contextlib
import os
from pathlib import Path

import pytest

import qfleet
from qfleet.config import TOPOLOGIES, AllReduceConfig, ConfigError
from qfleet.runtime import child_process
from qfleet.topologies.all_reduce import local_processes
from qfleet.topologies.all_reduce.launcher import check_places


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "host:1234"}, "coordinator and process_id must be given together"),
        ({"process_id": 0}, "coordinator and process_id must be given together"),
        ({"coordinator": "host", "process_id": 0}, "coordinator must be HOST:PORT, got host"),
        ({"ray_address": "auto", "coordinator": "host:1", "process_id": 0}, "ray_address must be given without"),
        ({"ray_address": "ray://host:1"}, "ray_address must be auto, local or HOST:PORT, got ray://host:1"),
        ({"coordinator": "host:1", "process_id": 2}, "process_id must be 0 to num_processes - 1 = 1, got 2"),
        ({"num_processes": 0}, "num_processes must be a whole number, at least 1, got 0"),
        ({"silence_seconds": 1}, "silence_seconds must be at least 5, got 1"),
        ({"num_env_workers": 20}, "num_env_workers must be at most num_envs / num_processes=16, got 20"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AllReduceConfig(**settings)


def addresses(topology: AllReduceConfig) -> tuple:
    return topology.num_processes, topology.coordinator, topology.process_id, topology.ray_address


BY_HAND = {"coordinator": "host:1", "process_id": 0}


@pytest.mark.parametrize(
    ("recorded", "given", "expected"),
    [
        (BY_HAND, {}, (2, "host:1", 0, None)),
        (BY_HAND, {"process_id": 1}, (2, "host:1", 1, None)),
        (BY_HAND, {"coordinator": "other:2"}, (2, "other:2", 0, None)),
        (BY_HAND, {"coordinator": "local", "num_processes": 1}, (1, None, None, None)),
        (BY_HAND, {"ray_address": "auto"}, (2, None, None, "auto")),
        ({"ray_address": "auto"}, {"num_processes": 4}, (4, None, None, "auto")),
        ({"ray_address": "auto"}, {"coordinator": "local"}, (2, None, None, None)),
        ({"ray_address": "auto"}, {"coordinator": "host:1", "process_id": 1}, (2, "host:1", 1, None)),
        ({}, {"coordinator": "host:1", "process_id": 3, "num_processes": 4}, (4, "host:1", 3, None)),
    ],
)
def test_a_resumed_run_is_started_as_it_was_or_as_is_said(recorded: dict, given: dict, expected: tuple) -> None:
    config = qfleet.make_config("CartPole-v1", "pqn", "all-reduce", num_processes=2, **recorded)
    assert addresses(config.topology.with_processes(given)) == expected


@pytest.mark.parametrize(
    ("topology", "given", "message"),
    [
        ("fused", {"process_id": 1}, "process_id must come with topology all-reduce, got fused; leave it out"),
        ("fused", {"coordinator": "host:1", "process_id": 1}, "coordinator and process_id must come .*leave them out"),
        ("all-reduce", {"coordinator": "host:1"}, "coordinator and process_id must be given together"),
        ("all-reduce", {"process_id": 1}, "coordinator and process_id must be given together"),
        ("all-reduce", {"coordinator": "local", "process_id": 1}, "local .* without process_id .* got 1 and None"),
        ("all-reduce", {"coordinator": "h:1", "process_id": 1, "ray_address": "auto"}, "ray_address must be given"),
    ],
)
def test_a_way_to_start_processes_that_makes_no_sense_is_refused(topology: str, given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TOPOLOGIES[topology]().with_processes(given)


# --- GPUs: the machine needs none, because only their names matter ---


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "_jax_has_cuda", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")


def test_a_host_with_fewer_gpus_than_its_processes_want_is_refused_before_the_folder_is_made(
    gpus, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"devices_per_process=1 GPUs of its own, got 2 visible here for 4 processes, which want 4; .* "
        r"--num-processes .* CUDA_VISIBLE_DEVICES",
    ):
        qfleet.iterate(
            qfleet.make_config("CartPole-v1", "pqn", "all-reduce", num_processes=4, run_dir=str(tmp_path / "run"))
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "is_enough"),
    [
        ({"num_processes": 2}, True),
        ({"num_processes": 2, "devices_per_process": 2}, False),
        ({"num_processes": 8, "coordinator": "host:1", "process_id": 7}, True),  # alone on its host
        ({"num_processes": 8, "coordinator": "host:1", "process_id": 7, "devices_per_process": 3}, False),
    ],
)
def test_only_the_processes_of_this_host_count(gpus, settings: dict, is_enough: bool) -> None:
    with contextlib.nullcontext() if is_enough else pytest.raises(ConfigError, match="got 2 visible here"):
        check_places(AllReduceConfig(**settings))


@pytest.mark.parametrize(
    ("variable", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("JAX_PLATFORMS", "cpu")]
)
def test_where_gpus_are_hidden_there_may_be_any_number_of_processes_and_they_stay_hidden(
    gpus, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    check_places(AllReduceConfig(num_processes=4))
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    assert local_processes.environment_of(3, 4, 1)["CUDA_VISIBLE_DEVICES"] == visible


def test_each_process_sees_gpus_of_its_own(gpus) -> None:
    def seen(*arguments: int) -> str:
        return local_processes.environment_of(*arguments)["CUDA_VISIBLE_DEVICES"]

    assert [seen(0, 2, 1), seen(1, 2, 1)] == ["4", "GPU-7"]
    assert seen(0, 1, 2) == "4,GPU-7"
    assert seen(0, 1, 1) == "4"
