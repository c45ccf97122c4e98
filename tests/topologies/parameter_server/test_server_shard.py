"""Shards of the server: the steps that they take, alone and together."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from small_servers import BATCH, batch_of, config_of, distance, learner_of, pulled

from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, update
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.topologies.parameter_server.server_shard import ServerShard
from qfleet.topologies.parameter_server.worker import Worker


@pytest.mark.parametrize("max_gradient_norm", [None, 0.5, 1000.0])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("num_gradients", [1, 4])
def test_gradients_of_workers_together_are_those_of_one_learner_on_the_joined_batch(
    num_gradients, num_shards, max_gradient_norm
):
    """Synchronous: each step is the mean of the workers' gradients with the newest parameters."""
    config = config_of(
        num_server_shards=num_shards, max_gradient_norm=max_gradient_norm, num_replay_shards=1,
        gradients_per_learner_step=num_gradients, max_staleness=0,
    )  # fmt: skip
    server = [ServerShard(config, i) for i in range(num_shards)]
    workers = [Worker(config, i) for i in range(num_gradients)]
    agent = make_agent(make_network(make_env(config.env).spec, config.agent), config.agent)
    learner = make_learner(agent, config.agent)
    sharded = learner_of(config)
    expected: Any = learner.init(sharded.join([shard.take_snapshot().leaves for shard in server]).params)
    one_step = jax.jit(functools.partial(update, learner))
    for step in range(50):
        batches = [batch_of(BATCH, 100 * step + i) for i in range(num_gradients)]
        gradients = []
        for worker, batch in zip(workers, batches, strict=True):
            worker.pull(step, *pulled(server))
            reply = worker.compute_gradient_of([np.arange(BATCH)], (batch,))
            gradients.append(reply.pieces)
        columns = list(zip(*gradients, strict=True))
        if num_shards > 1 and max_gradient_norm is not None:
            squares = [shard.average_gradients(column).values for shard, column in zip(server, columns, strict=True)]
            handed = [shard.apply_averages(squares) for shard in server]
        else:
            handed = [shard.apply_gradients(column) for shard, column in zip(server, columns, strict=True)]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
        expected, info = one_step(expected, joined)
        if num_gradients == 1:
            np.testing.assert_allclose(reply.result.loss, info.loss, rtol=1e-4)
        ours = sharded.assemble_params([each.params for each in handed])
        tolerance = 1e-6 if step == 0 else 1e-4
        assert distance(ours, expected.params) < tolerance, f"after step {step + 1}"
        assert (handed[0].target_params is not None) == ((step + 1) % config.agent.target_update_period == 0)
    state = sharded.join([shard.take_snapshot().leaves for shard in server])
    assert distance(state.target_params, expected.target_params) < 1e-4
    assert state.target_age == expected.target_age == 50 % 7


def test_a_server_goes_on_where_another_stopped():
    config = config_of(num_server_shards=2)
    first, second = ServerShard(config, 1), ServerShard(dataclasses.replace(config, seed=1), 1)
    assert not np.array_equal(first.publish().params, second.publish().params)
    gradient = np.ones(len(first.publish().params), np.float32)
    for _ in range(5):
        first.apply_gradients([gradient])
    second.restore(first.take_snapshot().leaves)
    for _ in range(4):
        ours, theirs = second.apply_gradients([gradient]), first.apply_gradients([gradient])
        np.testing.assert_array_equal(ours.params, theirs.params)
        assert (ours.target_params is None) == (theirs.target_params is None)
    second.reset()
    fresh = ServerShard(dataclasses.replace(config, seed=1), 1)
    np.testing.assert_array_equal(second.publish().params, fresh.publish().params)


@pytest.mark.parametrize("max_gradient_norm", [None, 0.5])
def test_steps_taken_at_once_are_those_taken_one_by_one(max_gradient_norm):
    config = config_of(num_server_shards=2, gradients_per_learner_step=2, max_gradient_norm=max_gradient_norm)
    random, (together, apart) = np.random.default_rng(0), [[ServerShard(config, i) for i in range(2)] for _ in range(2)]
    gradients = [[random.normal(size=len(shard.publish().params)).astype(np.float32) for shard in together]
                 for _ in range(2 * 9)]  # fmt: skip

    def take(server: list[ServerShard], some: list[list[np.ndarray]]) -> list[Any]:
        columns = list(zip(*some, strict=True))
        if max_gradient_norm is None:
            return [shard.apply_gradients(column) for shard, column in zip(server, columns, strict=True)]
        squares = [shard.average_gradients(column).values for shard, column in zip(server, columns, strict=True)]
        return [shard.apply_averages(squares) for shard in server]

    first, second = take(together, gradients[: 2 * 6]), take(together, gradients[2 * 6 :])
    assert first[0].target_params is None and second[0].target_params is not None, "it moves after 7"
    for i in range(9):
        alone = take(apart, gradients[2 * i : 2 * i + 2])
    for ours, theirs in zip(second, alone, strict=True):
        np.testing.assert_array_equal(ours.params, theirs.params)
    for ours, theirs in zip(together, apart, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.take_snapshot().leaves, theirs.take_snapshot().leaves)
