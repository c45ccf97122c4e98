"""Gossip in a simulated world, with thousands of seeds."""

import pytest

pytest.importorskip("ray")

import small_gossip
from fleet_simulator import World
from simulated_peers import GossipRig
from simulated_rig import play_all

CONFIGS = [
    small_gossip.config_of(
        num_processes=num_peers, num_envs=num_peers, gossip_period_learner_steps=period, env_steps=10**9,
        silence_seconds=10.0, max_restarts=10**6,
    )
    for num_peers, period in ((2, 4), (3, 2), (4, 8))
]  # fmt: skip


def make_rig(world: World) -> GossipRig:
    return GossipRig(world, world.random.choice(CONFIGS))


def test_an_exchange_is_applied_on_both_sides_or_dropped_whatever_goes_wrong():
    play_all(make_rig)
