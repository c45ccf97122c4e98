"""The parts of every topology are measured, each on its own, and no process is left afterwards."""

import dataclasses
from typing import Any

import pytest

from qfleet.config import (
    AllReduceConfig,
    ConfigError,
    GossipConfig,
    OverlappedConfig,
    ParameterServerConfig,
    TrainConfig,
)
from qfleet.planning.measuring.parts import measure_parts
from qfleet.presets import make_config

IN_STEP = {"learn", "snapshot", "memory"}


def config_of(env: str, preset: str, topology: Any) -> TrainConfig:
    agent: dict[str, Any] = {"hidden_sizes": (8,)}
    if preset == "dqn":
        agent |= {"warmup_env_steps": 50, "batch_size": 8}
    return dataclasses.replace(make_config(env, preset, **agent), topology=topology)


@pytest.mark.parametrize(
    ("env", "preset", "topology", "names"),
    [
        ("gym:CartPole-v1", "dqn", OverlappedConfig(num_envs=2), {"act", "environment beside learning", *IN_STEP}),
        ("gym:CartPole-v1", "pqn", OverlappedConfig(num_envs=4), {"act", "environment", "draw", *IN_STEP}),
        ("CartPole-v1", "pqn", AllReduceConfig(num_envs=4), {"row", *IN_STEP}),
        ("CartPole-v1", "dqn", GossipConfig(num_envs=4), {"chunk", "chunk after averaging", "call", "turn"}),
        (
            "CartPole-v1", "dqn", ParameterServerConfig(num_workers=2, num_server_shards=2, num_replay_shards=2),
            {"insert", "sample_share", "set_priorities", "average_gradients", "act", "act, new parameters",
             "compute_gradient", "compute_gradient, new parameters", "apply", "call", "turn", "decide", "wake"},
        ),
    ],
)  # fmt: skip
def test_the_parts_of_a_run_are_measured(env: str, preset: str, topology: Any, names: set[str]) -> None:
    if topology.runs_in == "ray":
        pytest.importorskip("ray")
    costs = measure_parts(config_of(env, preset, topology))
    assert names <= set(costs)
    assert all(cost.seconds > 0 for name, cost in costs.items() if name in {"learn", "row", "act", "apply"})


def test_an_environment_that_is_not_there_is_named() -> None:
    config = dataclasses.replace(config_of("CartPole-v1", "dqn", OverlappedConfig()), env="gym:Nowhere-v0")
    with pytest.raises(ConfigError, match="Nowhere"):
        measure_parts(config)
