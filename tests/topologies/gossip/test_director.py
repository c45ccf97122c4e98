"""The director of gossip in a simulated world, whose peers have one number each for parameters."""

import numpy as np
import pytest

pytest.importorskip("ray")

from fleet_simulator import World
from simulated_peers import ENV_STEPS_PER_CHUNK, GossipRig
from simulated_replay import saved_replay
from small_gossip import config_of

from qfleet.topologies.gossip.peer import StartingPoint
from qfleet.topologies.gossip.peer_records import Exchange


def rig_of(num_peers: int, seed: int = 0) -> GossipRig:
    config = config_of(
        num_processes=num_peers, num_envs=num_peers, env_steps=10**9, gossip_period_learner_steps=4, seed=seed
    )
    return GossipRig(World(seed, spread=0.5, slow={"peer 0": 3.0}), config)


def train(rig: GossipRig, num_chunks: int) -> None:
    """Lets the peers train, and then come to rest."""
    rig.resume()
    until = rig.director.env_steps + num_chunks * ENV_STEPS_PER_CHUNK
    rig.world.run(lambda: rig.director.env_steps >= until, 100_000, "nothing waits for ever")
    assert rig.quiesce()
    rig.check_at_rest()


def numbers_of(rig: GossipRig) -> list[float]:
    return [process.handle.model.value for _, process in rig.peers]


def pending(exchange: Exchange) -> float:
    """Returns what an exchange that was decided will add to a peer's number."""
    return (exchange.other.place.value.value - exchange.own.params.place.value.value) / 2


@pytest.mark.parametrize("num_peers", [2, 3, 8])
def test_the_sum_is_what_all_have_learned_whichever_is_slow_and_peers_that_learn_nothing_come_together(num_peers):
    rig = rig_of(num_peers, seed=num_peers)
    train(rig, 800)
    to_come = sum(pending(peer.exchange) for peer, _ in rig.peers if peer.exchange is not None)
    np.testing.assert_allclose(sum(numbers_of(rig)) + to_come, rig.ledger.begun_with + rig.ledger.learned, atol=1e-9)
    assert len(rig.ledger.applied) > 100
    rig.ledger.drift = 0.0
    train(rig, 400 * num_peers)
    assert np.ptp(numbers_of(rig)) < 1e-9, "two averaging steps from the same snapshot would drive them apart"


def test_an_exchange_of_a_peer_that_is_lost_is_not_passed_on_to_its_replacement():
    rig = rig_of(2)
    train(rig, 9)
    peer = rig.director.machine.peers[0]
    env_steps = peer.env_steps
    rig.world.host("peer 0").die()
    rig.world.run(lambda: rig.director.num_restarts == 1, 100, "a peer that died is replaced")
    assert (peer.stage, peer.snapshot, peer.exchange, peer.can_exchange) == ("absent", None, None, False)
    assert peer.env_steps == env_steps, "what was counted stays counted"
    train(rig, 20)


@pytest.mark.parametrize("num_held", [0, 8])
def test_a_peer_whose_share_is_empty_warms_up_anew_and_one_that_has_steps_goes_on_from_them(num_held):
    """Or it would learn from nothing, which isn't a number."""
    rig = rig_of(2)
    train(rig, 40)
    share = saved_replay([[0] * num_held] * 2)
    rig.checkpoint = {"learner": [np.float64(0.0), np.array(0)], "replay": share}, {"env_steps": 0, "learner_steps": 0}
    peer = rig.director.machine.peers[0]
    env_steps, learner_steps = peer.env_steps, peer.learner_steps
    rig.world.host("peer 0").die()
    train(rig, 20)
    start = rig.world.host("peer 0").model.start
    assert env_steps > num_held
    assert start == StartingPoint(env_steps, learner_steps, env_steps - num_held)
