"""Workers: the gradients that they compute, and the replay that each keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from small_servers import BATCH, batch_of, config_of, distance, learner_of, pulled

from qfleet.core.losses import huber_loss
from qfleet.core.sharded_learner import to_vector
from qfleet.topologies.parameter_server.server_shard import ServerShard
from qfleet.topologies.parameter_server.worker import Worker


def test_a_worker_learns_from_its_own_replay_and_sets_its_priorities():
    config = config_of(replay="prioritised", num_server_shards=2)
    worker, sharded = Worker(config, 1), learner_of(config)
    server = [ServerShard(config, i) for i in range(2)]
    worker.begin(0)
    worker.pull(3, *pulled(server))
    assert worker.version == 3
    for _ in range(6):
        report, stats, chunk = worker.act(1.0)
        assert chunk is None
    assert report.received_bytes == 0 and stats.num_transitions > 40
    for shard in server:  # so that TD errors aren't those by which the worker has acted
        shard.apply_gradients([np.ones(len(shard.publish().params), np.float32)])
    worker.pull(4, *pulled(server))
    store = worker._own_replay
    before = jax.tree.map(np.array, store.state)
    result, gradient, _ = worker.compute_gradient(0.4)
    leaves = np.asarray(store.replay.leaves(store.state)), np.asarray(store.replay.leaves(before))
    assert np.any(leaves[0] != leaves[1]), "priorities were set"
    # The same, by hand.
    key = functools.reduce(jax.random.fold_in, [6, 1, 0, 0], jax.random.key(config.seed))
    sample = store.replay.sample(jax.tree.map(jnp.array, before), key, np.float32(0.4))
    state = sharded.join([shard.take_snapshot().leaves for shard in server])
    expected, info = sharded.learner.gradients(jax.tree.map(jnp.array, state), sample.transition)
    np.testing.assert_allclose(np.concatenate(gradient), to_vector(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.loss, info.loss, rtol=1e-5)
    unweighted = np.mean(huber_loss(info.td_error, config.agent.huber_delta))
    np.testing.assert_allclose(result.unweighted_loss, unweighted, rtol=1e-5)
    assert result.unweighted_loss != result.loss, "importance weights don't decide what is unusual"
    assert not np.array_equal(np.concatenate(worker.compute_gradient(0.4).pieces), np.concatenate(gradient)), (
        "another batch"
    )


def test_a_worker_divides_weights_by_the_greatest_of_its_whole_batch_if_asked_to():
    """The batch comes from two shards. What is unusual is still decided without weights."""
    batch, half = batch_of(BATCH, 0), BATCH // 2
    scaled = batch._replace(weight=batch.weight / batch.weight.max())
    places = [np.arange(half), np.arange(half, BATCH)]
    replies = []
    for normalisation, batches in (("batch_max", [batch]), ("none", [scaled, batch])):
        config = config_of(replay="prioritised", num_replay_shards=2, importance_normalisation=normalisation)
        worker = Worker(config, 0)
        worker.pull(0, *pulled([ServerShard(config, 0)]))
        for each in batches:
            shares = [jax.tree.map(lambda x, place=place, each=each: x[place], each) for place in places]
            replies.append(worker.compute_gradient_of(places, shares))
    np.testing.assert_allclose(replies[0].pieces[0], replies[1].pieces[0], rtol=1e-5, atol=1e-7)
    assert distance(replies[2].pieces[0], replies[1].pieces[0]) > 1e-3
    assert replies[0].result.unweighted_loss == replies[2].result.unweighted_loss != replies[0].result.loss


def test_gradients_travel_as_bfloat16_where_that_is_asked_for():
    vectors = {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(gradient_dtype=dtype, num_replay_shards=1)
        worker = Worker(config, 0)
        worker.pull(0, *pulled([ServerShard(config, 0)]))
        vectors[dtype] = worker.compute_gradient_of([np.arange(BATCH)], (batch_of(BATCH, 0),)).pieces[0]
    assert vectors["bfloat16"].nbytes == vectors["float32"].nbytes / 2
    assert 0 < distance(vectors["bfloat16"].astype(np.float32), vectors["float32"]) < 0.01
