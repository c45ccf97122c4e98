"""Stored states and sequences from the actors of a fleet to its learner, without Ray."""

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from small_fleets import config_of

from qfleet.config import AgentConfig, FusedConfig, TrainConfig
from qfleet.core.replay import NO_STEP, DrawShare, SavedReplay, make_replay
from qfleet.core.types import Sequences
from qfleet.networks import make_network
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.actor_learner.learner import GlobalLearner
from qfleet.topologies.fleet.actor import Actor
from qfleet.topologies.fleet.env_and_agent import EnvAndAgent, make_env_and_agent
from qfleet.topologies.fleet.replay_shard import ReplayShard, Writer
from qfleet.topologies.fused.topology import Fused
from qfleet.topologies.restoring import saved_replay

BATCH = 8
SETTINGS = {
    "memory": "lstm", "memory_size": 4, "hidden_sizes": (8,), "batch_size": BATCH, "burn_in": 2, "sequence_length": 6,
    "n_step": 2, "num_actors": 1, "num_replay_shards": 1, "value_rescaling": True,
}  # fmt: skip


def acted(env: str, num_chunks: int) -> tuple[EnvAndAgent, object, Actor, list]:
    """Returns what one actor with random parameters has done."""
    config = config_of(env, **SETTINGS)
    built = make_env_and_agent(config)
    params = jax.jit(built.agent.init)(jax.random.key(0))
    actor = Actor(config, 0, built)
    actor.begin(0)
    actor.receive(0, [np.asarray(leaf) for leaf in jax.tree.leaves(params)])
    chunks = [actor.collect(0.5)[1] for _ in range(num_chunks)]
    actor.close()
    return built, params, actor, chunks


@pytest.mark.parametrize("env", ["CartPole-v1", "gym:CartPole-v1"])
def test_the_states_of_an_actor_are_what_its_network_remembered_before_each_row(env):
    built, params, _, chunks = acted(env, 5)
    rows = jax.tree.map(lambda *x: np.concatenate(x), *(chunk.rows for chunk in chunks))
    follows_an_end = rows.outcome[:-1] == NO_STEP
    assert follows_an_end.any(), "an episode must have ended"
    is_first = np.concatenate([np.ones_like(follows_an_end[:1]), follows_an_end])
    np.testing.assert_array_equal(rows.carry[is_first], 0)
    recurrence = built.network.recurrence
    step = jax.jit(lambda carry, obs, first: recurrence.step(params, carry, obs, first, None)[0])
    for t in range(len(rows.obs) - 1):
        carry = np.where(is_first[t + 1][:, None], 0.0, step(rows.carry[t], rows.obs[t], jnp.zeros(2, bool)))
        np.testing.assert_allclose(rows.carry[t + 1], carry, atol=1e-6)


def test_a_learner_learns_from_the_sequences_that_a_shard_draws_and_its_priorities_come_back():
    config = config_of(**SETTINGS)
    built, _, _, chunks = acted("CartPole-v1", 5)
    shard = ReplayShard(config, 0, built.stored_spec, built.agent.carry_size)
    for i, chunk in enumerate(chunks):
        assert np.isnan(chunk.td_error).all(), "new sequences enter at the greatest priority"
        shard.insert(0, Writer(0, i), chunk)
    num_rows = sum(len(chunk.rows.obs) for chunk in chunks)
    num_sequences = 2 * len(range(0, num_rows - config.agent.rows_after_start, config.agent.rows_per_start))
    assert shard.stats().num_transitions == num_sequences
    learner = GlobalLearner(config)
    size = learner._num_batches * BATCH
    share = DrawShare(np.int32(size), np.float32(1), np.float32(num_sequences))
    _, batch = shard.sample_share(0, 1, 0.4, share, size)
    assert isinstance(batch, Sequences) and batch.obs.shape == (size, 10, 4)
    before = learner.publish()[1]
    result, (priority,) = learner.learn([np.arange(size)], batch)
    assert np.isfinite(result.loss) and result.learner_steps == learner._num_batches
    assert any(np.any(x != y) for x, y in zip(before, learner.publish()[1], strict=True))
    total = shard.stats().total_priority
    assert priority.shape == (size,) and shard.set_priorities(0, priority).total_priority != total


def bytes_of(memory: str) -> dict[str, int]:
    """Returns the sizes of the parts of a small run that keeps 20 rows of 4 lanes and draws 8 sequences of 10 rows."""
    agent = AgentConfig(
        replay="uniform", memory=memory, memory_size=4, hidden_sizes=(8,), batch_size=BATCH, burn_in=2,
        sequence_length=6, n_step=2, replay_capacity=4 * 20,
    )  # fmt: skip
    env = probes.random_walk()
    config = TrainConfig(env="probe", agent=agent, topology=FusedConfig(num_envs=4), eval_episodes=5)
    footprint = Fused(config, env, make_network(env.spec, agent)).footprint()
    return {part.name: part.total_bytes for part in footprint.parts}


def test_a_footprint_counts_the_states_of_rows_lanes_and_sequences():
    lstm, gru = bytes_of("lstm"), bytes_of("gru")
    rows = 20 // 3 * 3  # whole periods
    assert lstm["replay"] - gru["replay"] == rows * 4 * 4 * 4
    assert lstm["lanes"] - gru["lanes"] == 4 * 4 * 4
    assert lstm["batch"] - gru["batch"] == BATCH * 4 * 4
    assert lstm["batch"] > BATCH * (8 * 4 + 10 * 1 + 6 * (4 * 4 + 1) + 4)


def test_a_checkpoint_keeps_the_states(tmp_path):
    replay = make_replay(probes.random_walk().spec, config_of(**SETTINGS).agent, 2, carry_size=3)
    ring = replay.init().ring
    states = np.random.default_rng(0).normal(size=ring.rows.carry.shape).astype(np.float32)
    saved = SavedReplay(ring._replace(rows=ring.rows._replace(carry=jnp.asarray(states))), (), jnp.float32(1))
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(7, {"replay": saved}, {})
        read = saved_replay(checkpoints.restore_item("replay"))
    np.testing.assert_array_equal(read.ring.rows.carry, states)
