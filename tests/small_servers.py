"""Small parameter servers for tests."""

from typing import Any

import numpy as np

import qfleet
from qfleet.config import TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.sharded_learner import ShardedLearner, to_vector
from qfleet.core.types import Transition
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.topologies.parameter_server.server_shard import ServerShard

BATCH = 16


def config_of(env: str = "CartPole-v1", preset: str = "double_dqn", **settings: Any) -> TrainConfig:
    sizes = {
        "num_workers": 4, "lanes_per_worker": 2, "rows_per_chunk": 8, "hidden_sizes": (16,), "batch_size": BATCH,
        "replay_capacity": 1024, "warmup_env_steps": 64, "env_steps_per_learner_step": 4.0, "target_update_period": 7,
    }  # fmt: skip
    return qfleet.make_config(env, preset, "parameter-server", **{**sizes, **settings})


def learner_of(config: TrainConfig) -> ShardedLearner:
    agent = make_agent(make_network(make_env(config.env).spec, config.agent), config.agent)
    return ShardedLearner(agent, config.agent, config.topology.num_server_shards)


def batch_of(size: int, seed: int) -> Transition:
    random = np.random.default_rng(seed)
    return Transition(
        obs=random.normal(size=(size, 4)).astype(np.float32),
        action=random.integers(2, size=size).astype(np.int32),
        reward=3 * random.normal(size=size).astype(np.float32),
        discount=np.full(size, 0.9, np.float32),
        next_obs=random.normal(size=(size, 4)).astype(np.float32),
        weight=random.random(size).astype(np.float32),
    )


def pulled(server: list[ServerShard]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Returns the arguments of `Worker.pull` after the version: the server's parameters and its target network."""
    published = [shard.publish() for shard in server]
    return tuple(each.params for each in published), tuple(each.target_params for each in published)


def distance(ours: Any, theirs: Any) -> float:
    """Returns how far apart two trees are, relative to the second."""
    ours, theirs = (np.asarray(to_vector(tree)) for tree in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
