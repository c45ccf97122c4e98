"""Peers that gossip: the averaging step, who exchanges with whom, what a checkpoint holds, and a peer by itself."""

import dataclasses

import jax
import numpy as np
import pytest
from small_gossip import config_of

from qfleet.cli.train_command import parse
from qfleet.config import ConfigError, FusedConfig, GossipConfig, OverlappedConfig, TrainConfig
from qfleet.topologies.fleet.replay_shares import join_shards, share_of
from qfleet.topologies.gossip.averaging import average_step, consensus_distance, mean_of, split_evenly
from qfleet.topologies.gossip.peer import GossipPeer, StartingPoint, peer_config
from qfleet.topologies.gossip.topology import env_steps_per_chunk
from qfleet.topologies.mesh import leaves_of
from qfleet.training.assembly import footprint, make_own_learner


def prepared(config: TrainConfig, number: int, *, is_in_graph: bool = True) -> GossipPeer:
    peer = GossipPeer(peer_config(config, number, is_in_graph=is_in_graph), make_own_learner)
    peer.prepare()
    return peer


# --- The averaging step ---


def test_peers_that_have_learned_nothing_since_arrive_at_the_mean_of_the_two():
    first, second = [np.float32([1, 2])], [np.float32([3, -2])]
    assert average_step(first, first, second)[0].tolist() == average_step(second, second, first)[0].tolist() == [2, 0]


def test_what_one_peer_gains_by_an_exchange_the_other_gives_whatever_both_have_learned_since():
    random = np.random.default_rng(0)
    own, other, learned = random.normal(size=(3, 1000)).astype(np.float32)
    nothing = np.zeros(1000, np.float32)
    gained, given = average_step([nothing], [own], [other])[0], average_step([nothing], [other], [own])[0]
    np.testing.assert_array_equal(gained, -given)
    after = average_step([own + learned], [own], [other])[0] + average_step([other], [other], [own])[0]
    np.testing.assert_allclose(after, own + learned + other, atol=1e-5)


def test_the_mean_is_in_float64_and_a_counter_is_that_of_the_furthest():
    states = [[np.float32(2**24), np.int32(i), np.array(i == 1)] for i in range(3)]
    states[0][0] = np.float32(1)
    weight, count, flag = mean_of(states, furthest=1)
    assert weight == np.float32((2**25 + 1) / 3) and weight.dtype == np.float32
    assert count == 1 and count.dtype == np.int32 and flag


def test_the_distance_is_relative_and_of_all_leaves_together():
    peers = [[np.float32([3.0]), np.float32([4.0 + d])] for d in (-1, 1)]
    assert consensus_distance(peers) == pytest.approx(1 / 5)
    assert consensus_distance(peers[:1]) == consensus_distance([[np.zeros(2, np.float32)]] * 2) == 0


def test_shares_differ_by_one_at_most_and_add_up_to_the_total():
    assert split_evenly(10, 4) == [3, 3, 2, 2] and split_evenly(2, 4) == [1, 1, 0, 0]


# --- A peer ---


def test_a_peer_has_its_share_of_what_counts_environment_steps_and_batches_of_its_own():
    config = config_of(exploration_env_steps=1_001, num_envs=8, num_processes=4)
    first, second = (peer_config(config, i, is_in_graph=True) for i in range(2))
    assert first.topology == FusedConfig(num_envs=2)
    agent = first.agent
    assert (agent.replay_capacity, agent.warmup_env_steps, agent.exploration_env_steps) == (512, 32, 251)
    assert agent.batch_size == 16 and agent.replay_ratio == config.agent.replay_ratio
    assert len({first.seed, second.seed, config.seed}) == 3
    assert first == peer_config(config, 0, is_in_graph=True)
    host = peer_config(config_of(env="gym:CartPole-v1", num_env_workers=1, lock_step=True), 0, is_in_graph=False)
    assert host.topology == OverlappedConfig(num_envs=2, num_env_workers=1, lock_step=True)


def test_peers_share_the_learner_steps_of_a_schedule_unless_each_learns_from_its_own_rollouts():
    schedule = {"learning_rate_schedule": "linear", "learning_rate_learner_steps": 1_001}
    with_replay = config_of(num_envs=8, num_processes=4, **schedule)
    assert peer_config(with_replay, 0, is_in_graph=True).agent.learning_rate_learner_steps == 251
    assert peer_config(with_replay, 0, is_in_graph=True).agent.target_update_period == 500
    without = config_of("pqn", num_envs=8, num_processes=4, **schedule)
    own = peer_config(without, 0, is_in_graph=True)
    assert own.agent.learning_rate_learner_steps == 1_001
    whole, share = without.num_learner_steps, dataclasses.replace(own, env_steps=own.env_steps // 4).num_learner_steps
    assert whole == share, "a peer takes as many learner steps as one process would"


def test_the_division_over_peers_breaks_no_rule_that_the_whole_run_keeps():
    config = config_of(
        num_envs=8, num_processes=4, warmup_env_steps=1_001, exploration_env_steps=1_002, env_steps=9_999
    )
    agent = peer_config(config, 0, is_in_graph=True).agent
    assert agent.warmup_env_steps < agent.exploration_env_steps


def test_a_chunk_is_half_a_period_in_whole_iterations():
    assert env_steps_per_chunk(peer_config(config_of(), 0, is_in_graph=True), 32) == 64  # 8 learner steps in 32
    assert env_steps_per_chunk(peer_config(config_of(), 0, is_in_graph=True), 1) == 32
    own = peer_config(config_of("pqn"), 0, is_in_graph=True)  # 16 in each rollout of 2 x 16
    assert env_steps_per_chunk(own, 33) == 64


@pytest.mark.parametrize(
    ("preset", "env"), [("pqn", "CartPole-v1"), ("rainbow_lite", "CartPole-v1"), ("dqn", "gym:CartPole-v1")]
)
def test_a_peer_goes_on_where_another_stopped_and_takes_half_of_the_way_to_it(preset, env):
    config = config_of(preset, env)
    first, second = (prepared(config, i, is_in_graph=":" not in env) for i in range(2))
    assert first.state() is None, "it hasn't begun"
    _, start = second.copy_learner()
    for peer in (first, second):
        peer.begin(StartingPoint(0, 0, 0), start, None)
    (stats, own), (_, other) = first.take_chunk(512), second.take_chunk(512)
    assert sum(progress.new_env_steps for progress in stats.progress) == 512 and stats.staleness is None
    assert stats.learner_steps == stats.progress[-1].learner_steps > 0
    assert consensus_distance([own, other]) > 0, "they begin alike, and see other episodes"

    learner_steps_then = stats.learner_steps
    first.take_chunk(64)
    before = leaves_of(first._run.params)
    learner_steps, first._run.advance = first._run.learner_steps, None  # type: ignore[method-assign]
    stats, after = first.take_chunk(0, learner_steps_then, own, other)
    assert stats.staleness == learner_steps - learner_steps_then > 0
    assert stats.received_bytes == sum(leaf.nbytes for leaf in other)
    jax.tree.map(np.testing.assert_array_equal, after, average_step(before, own, other))

    _, learner, replay = first.state()
    assert (replay is None) == (preset == "pqn")
    assert replay is None or int(replay.ring.size[0]) * 2 == 576
    second.begin(StartingPoint(576, learner_steps, 0), learner, replay)
    jax.tree.map(np.testing.assert_array_equal, second.copy_learner()[1], learner)
    stats, _ = second.take_chunk(64)
    assert stats.progress[-1].env_steps == 640 and stats.learner_steps > learner_steps
    for peer in (first, second):
        peer._run.close()


@pytest.mark.parametrize("preset", ["dqn", "rainbow_lite"])
def test_replays_are_joined_lane_by_lane_and_divided_again(preset):
    config = config_of(preset)
    pool = config.topology.actor_pool
    peers = [prepared(config, i) for i in range(2)]
    for i, peer in enumerate(peers):
        peer.begin(StartingPoint(0, 0, 0), peer.copy_learner()[1], None)
        peer.take_chunk(64 + 128 * i)
    replays = [peer.state()[2] for peer in peers]
    whole = join_shards(replays, pool)
    assert whole.ring.rows.action.shape == (512, 4) and whole.ring.size.tolist() == [32, 96]
    for i, replay in enumerate(replays):
        jax.tree.map(np.testing.assert_array_equal, share_of(whole, pool, i)._replace(max_priority=0),
                     replay._replace(max_priority=0))  # fmt: skip


# --- What is refused, and what it takes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gossip_period_learner_steps": 0}, "gossip_period_learner_steps must be a whole number, at least 1"),
        (
            {"coordinator": "h:1", "process_id": 0},
            "coordinator must come with topology all-reduce, got topology gossip; leave",
        ),
        ({"num_envs": 5}, "num_envs must divide over num_processes x devices_per_process"),
        ({"devices_per_process": 2, "batch_size": 3}, "batch_size must divide over devices_per_process"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


def test_what_peers_cannot_do_is_refused_before_the_run_is_made(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="coordinator and process_id must come with topology all-reduce, got gossip"):
        config_of().topology.with_processes({"coordinator": "host:1", "process_id": 0})
    assert not (tmp_path / "run").exists()


def test_a_batch_of_each_peer_need_not_divide_over_the_peers():
    assert config_of(batch_size=17).agent.batch_size == 17


def test_the_command_line_has_it():
    config = parse(["CartPole-v1", "--topology", "gossip", "--num-processes", "4"]).config
    assert config.topology == GossipConfig(num_processes=4)


def test_the_footprint_is_that_of_all_peers():
    pytest.importorskip("ray")
    config = config_of("rainbow_lite")
    one = footprint(peer_config(config, 0, is_in_graph=True))
    both = footprint(config)
    assert [part.name for part in both.parts] == [part.name for part in one.parts]
    assert both.bytes_per_device == 2 * one.bytes_per_device
