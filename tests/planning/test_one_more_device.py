"""One more device takes its share of the work, as measured on one device, and exchanges gradients with the others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qfleet.cli.main import main
from qfleet.config import (
    ActorLearnerConfig,
    AllReduceConfig,
    FusedConfig,
    GossipConfig,
    MeshConfig,
    OverlappedConfig,
    ParameterServerConfig,
    TrainConfig,
)
from qfleet.planning import planner
from qfleet.planning.cluster import Cluster, NodeGroup
from qfleet.planning.costs import Cost, Costs
from qfleet.planning.one_more_device import (
    LINK_BYTES_PER_SECOND,
    MESSAGE_SECONDS,
    costs_of_shares,
    with_costs_of_shares,
    with_one_more_device,
)
from qfleet.planning.prediction import WhatIf
from qfleet.presets import make_config
from qfleet.topologies.footprint import Footprint, Part

MILLISECOND = 1e-3
MEMORY: Costs = {"memory": Cost(0.0, num_bytes=1), "snapshot": Cost(1e-6, num_bytes=1)}


def config_of(topology: Any, preset: str = "dqn", **agent: Any) -> TrainConfig:
    return dataclasses.replace(make_config("CartPole-v1", preset, **agent), topology=topology)


def fused(**agent: Any) -> TrainConfig:
    """Returns a run of 8 lanes with two learner steps after each row."""
    settings = {"hidden_sizes": (8,), "batch_size": 64, "env_steps_per_learner_step": 4.0, **agent}
    return config_of(FusedConfig(num_envs=8), **settings)


# --- Its sizes ---


def change_of(config: TrainConfig, platform: str = "gpu") -> str:
    more = with_one_more_device(config, platform)
    assert more is not None
    return more.change


def test_the_sizes_that_would_be_used_are_named() -> None:
    config = config_of(FusedConfig(num_envs=32), batch_size=512)
    assert change_of(config) == "one more GPU (32 lanes -> 2 x 16, batch 512 -> 2 x 256)"
    assert change_of(config, "tpu").startswith("one more device (32 lanes")
    assert change_of(config_of(ActorLearnerConfig(), batch_size=512)) == "one more GPU (batch 512 -> 2 x 256)"
    assert change_of(config_of(FusedConfig(num_envs=32), "pqn")) == "one more GPU (32 lanes -> 2 x 16)"


def test_sizes_are_rounded_up() -> None:
    config = config_of(FusedConfig(num_envs=32, mesh=MeshConfig(data=2)), batch_size=64, replay_capacity=1000)
    more = with_one_more_device(config, "gpu")
    assert more is not None
    assert more.change == "one more GPU (32 lanes -> 3 x 11, batch 64 -> 3 x 22)"
    for shares, found in ((3, more.config), (1, more.share)):
        sizes = found.topology.mesh.data, found.topology.num_envs, found.agent.batch_size, found.agent.replay_capacity
        assert sizes == (shares, shares * 11, shares * 22, 1000 if shares == 3 else 334)


def test_lanes_are_rounded_up_to_whole_minibatches() -> None:
    settings = {"memory": "gru", "num_minibatches": 4, "rollout_length": 8}
    config = config_of(FusedConfig(num_envs=32, mesh=MeshConfig(data=2)), "pqn", **settings)
    assert change_of(config) == "one more GPU (32 lanes -> 3 x 12)"


def test_a_network_that_is_divided_takes_more_of_them() -> None:
    assert change_of(config_of(FusedConfig(mesh=MeshConfig(model=2)))).startswith("2 more GPUs (32 lanes -> 2 x 16")


def test_a_worker_of_environments_has_a_lane_in_each_share() -> None:
    config = config_of(OverlappedConfig(num_envs=8, num_env_workers=6))
    more = with_one_more_device(config, "gpu")
    assert more is not None
    assert (more.config.topology.lane_options.num_env_workers, more.share.topology.lane_options.num_env_workers) == (
        6,
        4,
    )


@pytest.mark.parametrize(
    "config",
    [
        config_of(AllReduceConfig()),
        config_of(GossipConfig()),
        config_of(ParameterServerConfig()),
        config_of(FusedConfig(num_envs=33), replay_capacity=165, n_step=3),  # no room for another lane
    ],
)
def test_a_run_that_is_not_possible_is_not_predicted(config: TrainConfig) -> None:
    assert with_one_more_device(config, "gpu") is None


# --- Its costs ---


def shares_of(config: TrainConfig, costs: Costs, of_share: Costs, *, batches: tuple[int, int] = (1, 1)) -> Costs:
    """Returns the costs of shares of a network of 400 MB that learns from batches of 80 MB."""
    parts = [
        Part(name=name, total_bytes=size, bytes_per_device=size, axis=None)
        for name, size in (("parameters", 400_000_000), ("batch", 80_000_000))
    ]
    more = with_one_more_device(config, "gpu")
    assert more is not None
    return costs_of_shares(more, costs, of_share, Footprint(axes={}, devices=(), parts=tuple(parts)), batches)


def test_gradients_pass_twice_and_a_batch_once() -> None:
    """Of two devices each sends half of 2 * 400 MB, and half of 80 MB, at 20 GB/s."""
    found = shares_of(fused(), {}, {})
    assert found["all-reduce"].seconds == pytest.approx(440e6 / LINK_BYTES_PER_SECOND + 10 * MESSAGE_SECONDS)


def test_a_rollout_is_not_dealt() -> None:
    found = shares_of(config_of(FusedConfig(num_envs=8), "pqn"), {}, {})
    assert found["all-reduce"].seconds == pytest.approx(400e6 / LINK_BYTES_PER_SECOND + 2 * MESSAGE_SECONDS)


def test_a_global_learner_waits_less_for_its_devices_and_its_host_does_the_same() -> None:
    """A round has 2 batches, and 4 in the share that was measured."""
    costs, of_share = {"learn": Cost(2.0, wait_seconds=18.0)}, {"learn": Cost(1.5, wait_seconds=16.0), "act": Cost(1.0)}
    found = shares_of(config_of(ActorLearnerConfig()), costs, of_share, batches=(2, 4))
    assert set(found) == {"learn, one more device", "all-reduce"}
    assert found["learn, one more device"] == Cost(2.0, wait_seconds=8.0)
    assert found["all-reduce"].seconds == pytest.approx(2 * (400e6 / LINK_BYTES_PER_SECOND + 4 * MESSAGE_SECONDS))


def test_environments_of_the_host_are_not_divided() -> None:
    """Of 10 s of stepping and 14 s of storing and learning, 5 s are hidden: half of the shorter one."""
    costs = {
        "act": Cost(1.0), "environment": Cost(10.0), "insert": Cost(2.0), "learn": Cost(3.0),
        "environment beside learning": Cost(19.0), "all-reduce": Cost(0.0, wait_seconds=0.5),
        "act, one more device": Cost(0.6), "insert, one more device": Cost(1.0), "learn, one more device": Cost(1.5),
    }  # fmt: skip
    found = with_costs_of_shares(costs, 1.2)
    assert {name: found[name].seconds for name in ("act", "environment", "insert", "learn")} == {
        "act": 0.6, "environment": 12.0, "insert": 1.0, "learn": 2.0,
    }  # fmt: skip
    assert found["environment beside learning"].seconds == pytest.approx(12.0 + 9.0 - 0.5 * 9.0)


# --- The plan ---


Plans = Callable[..., list[WhatIf]]


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plans:
    """Returns a function that plans a run with costs that are given, as if its devices were others."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("QFLEET_CACHE_DIR", str(tmp_path / "cache"))
    real = planner.footprint

    def plan(config: TrainConfig, whole: Costs, share: Costs, *, platform: str = "gpu", **arguments: Any) -> Any:
        device = SimpleNamespace(platform=platform, device_kind="fake")
        measured = iter([whole, share])
        monkeypatch.setattr(planner, "footprint", lambda c: dataclasses.replace(real(c), devices=(device,)))
        monkeypatch.setattr(planner, "visible_gpus", lambda: ["0"] if platform == "gpu" else [])
        monkeypatch.setattr(planner, "measure_parts", lambda _: {**MEMORY, **next(measured)})
        found = planner.make_plan(config, measure=True, **arguments).what_if
        return [each for each in found if "GPU" in each.change]

    return plan


def in_graph(row: float, learn: float) -> Costs:
    return {"row": Cost(row * MILLISECOND), "learn": Cost(learn * MILLISECOND)}


def test_a_share_takes_less_and_gradients_are_exchanged(plans: Plans) -> None:
    """A row of 8 lanes and its two learner steps took 1 + 2 * 10 ms, and will take 0.8 + 2 * (6 + 0.1) ms.

    The 0.1 ms are five messages of little size, there and back, of 10 us each.
    """
    (more,) = plans(fused(), in_graph(1.0, 10.0), in_graph(0.8, 6.0))
    assert more.change == "one more GPU (8 lanes -> 2 x 4, batch 64 -> 2 x 32)"
    assert more.env_steps_per_second == pytest.approx(8 / (13.0 * MILLISECOND), rel=1e-3)
    assert more.gain == pytest.approx(21 / 13 - 1, rel=1e-2)


def test_one_more_device_is_a_loss_where_the_exchange_takes_longest(plans: Plans) -> None:
    """Two learner steps of 0.06 ms and 0.1 ms for their exchange take longer than two of 0.1 ms."""
    costs = in_graph(0.01, 0.1), in_graph(0.006, 0.06)
    (more,) = plans(fused(), *costs)
    assert more.gain == pytest.approx(0.21 / (0.006 + 2 * 0.16) - 1, abs=0.01)
    assert more.gain < -0.3
    node = Cluster(groups=(NodeGroup(cores=8),), factors={"all-reduce": 0.1})
    (faster_link,) = plans(fused(), *costs, cluster=node)
    assert faster_link.gain == pytest.approx(0.21 / (0.006 + 2 * 0.07) - 1, abs=0.01)


def test_factors_apply_to_shares(plans: Plans) -> None:
    node = Cluster(groups=(NodeGroup(cores=8),), factors={"learn": 0.5})
    (more,) = plans(fused(), in_graph(1.0, 10.0), in_graph(0.8, 6.0), cluster=node)
    assert more.env_steps_per_second == pytest.approx(8 / (7.0 * MILLISECOND), rel=1e-3)


def test_one_more_device_of_a_cpu_brings_nothing_so_nothing_is_said(plans: Plans) -> None:
    assert plans(fused(), in_graph(1.0, 10.0), {}, platform="cpu") == []


def test_one_more_device_of_a_learner_that_sets_the_pace(plans: Plans) -> None:
    """A round of 16 learner steps takes 2 ms of the host, 9 ms of the devices, and 16 times 0.04 ms for gradients."""
    pytest.importorskip("ray")
    settings = {"hidden_sizes": (8,), "batch_size": 64, "env_steps_per_learner_step": 4.0, "warmup_env_steps": 100}
    topology = ActorLearnerConfig(num_actors=2, lanes_per_actor=4, rows_per_chunk=8)
    quick = dict.fromkeys(
        ("collect", "collect, new parameters", "insert", "sample_share", "set_priorities", "publish", "call", "turn"),
        Cost(1e-5),
    )
    whole = {**quick, "learn": Cost(2 * MILLISECOND, wait_seconds=18 * MILLISECOND)}
    share = {**quick, "learn": Cost(1 * MILLISECOND, wait_seconds=9 * MILLISECOND)}
    node = Cluster(groups=(NodeGroup(cores=8),), latency_seconds=0.0, call_seconds=1e-5)
    (more,) = plans(config_of(topology, **settings), whole, share, cluster=node)
    assert more.change == "one more GPU (batch 64 -> 2 x 32)"
    assert more.env_steps_per_second == pytest.approx(4 * 16 / (11.64 * MILLISECOND), rel=0.05)


def test_help_and_page_say_what_is_assumed_of_the_link(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    for text in (capsys.readouterr().out, page):
        assert f"{LINK_BYTES_PER_SECOND / 1e9:g} GB/s" in text
    assert f"{MESSAGE_SECONDS * 1e6:g} µs" in page
