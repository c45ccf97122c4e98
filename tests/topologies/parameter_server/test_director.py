"""The director of the parameter server in a simulated world, in which nothing is left to chance."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ray")

from fleet_simulator import World
from simulated_server import ServerRig
from small_servers import config_of


def rig_of(world: World | None = None, **settings: Any) -> ServerRig:
    rig = ServerRig(world or World(0), config_of(env_steps=10**9, silence_seconds=1000.0, **settings))
    rig.resume()
    return rig


def run(rig: ServerRig, until: Callable[[], bool]) -> None:
    rig.world.run(until, 30_000, "it doesn't come to a standstill")


def train(rig: ServerRig, until_learner_steps: int) -> None:
    run(rig, lambda: rig.director.learner_steps >= until_learner_steps)


def lose(rig: ServerRig, name: str) -> None:
    """Loses a process, and returns when the director has heard of it."""
    before = rig.director.num_restarts
    rig.world.host(name).die()
    run(rig, lambda: rig.director.num_restarts > before)


def rest(rig: ServerRig) -> None:
    """Waits until nothing is under way, and requires that all shards are in the state that is counted."""
    assert rig.quiesce()
    run(rig, lambda: not any(process.calls for process in rig.director._servers))
    rig.check_at_rest()
    rig.resume()


def test_with_as_many_gradients_a_step_as_workers_and_no_staleness_all_are_in_step():
    rig = rig_of(num_server_shards=2, gradients_per_learner_step=4, max_staleness=0)
    stats = rig.director._stats
    train(rig, 40)
    assert set(stats.staleness) == {0} and stats.num_gradients["stale"] == 0
    assert len(stats.losses) == 4 * 40


def test_learning_goes_on_without_a_slow_worker_whose_gradients_are_refused():
    rig = rig_of(World(0, slow={"worker 3": 40.0}), num_server_shards=2, max_staleness=8)
    stats = rig.director._stats
    train(rig, 900)
    assert max(stats.staleness) <= 8
    assert stats.num_gradients["stale"] >= 3 and stats.num_gradients["outlier"] == 0
    assert stats.num_gradients["applied"] == rig.director.learner_steps
    assert stats.actor_env_steps[3] < 0.5 * stats.actor_env_steps[:3].min()
    rest(rig)


def test_a_lost_shard_has_all_go_back_to_one_snapshot_and_refuses_older_gradients(caplog):
    rig = rig_of(num_workers=2, num_server_shards=2, snapshot_period_learner_steps=20)
    director, stats = rig.director, rig.director._stats
    train(rig, 110)
    version = director.version
    run(rig, lambda: all(worker.is_learning for worker in director.machine.actors.each))
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        lose(rig, "server shard 1")
    assert "server shard 1 was lost: the server goes back from learner step" in caplog.text
    back_at = director.learner_steps
    assert 80 <= back_at < 111 and director.version > version, "steps go back, versions never"
    lose(rig, "server shard 0")  # before all have gone back
    assert director.learner_steps == back_at
    rest(rig)
    train(rig, 160)
    assert stats.num_gradients["stale"] >= 1


def test_steps_that_wait_when_a_shard_is_lost_are_refused_and_learning_goes_on():
    rig = rig_of(
        World(0, seconds={"average_gradients": 2.0}), num_workers=2, num_server_shards=2,
        snapshot_period_learner_steps=20, max_gradient_norm=10.0,
    )  # fmt: skip
    director, stats = rig.director, rig.director._stats
    train(rig, 50)
    run(rig, lambda: director.machine.server.is_stepping and director.machine.server.queue.pending_steps)
    waiting, learner_steps = len(director.machine.server.queue.pending_steps), director.learner_steps
    num_stale = stats.num_gradients["stale"]
    lose(rig, "server shard 0")
    assert not director.machine.server.queue.pending_steps and stats.num_gradients["stale"] >= num_stale + waiting
    assert director.learner_steps < learner_steps
    train(rig, 100)
    rest(rig)


def test_a_server_lost_before_any_snapshot_begins_anew(caplog):
    rig = rig_of(num_workers=1, num_server_shards=1, snapshot_period_learner_steps=10**6)
    train(rig, 5)
    rig.director.machine.server._snapshot = None
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        lose(rig, "server shard 0")
    assert "the beginning: there is neither snapshot nor checkpoint" in caplog.text
    assert rig.director.learner_steps == 0
    train(rig, 20)


def test_a_state_that_is_lost_on_its_way_to_a_shard_has_all_go_back_again(caplog):
    """Or one shard would go on from the beginning, and the others from the snapshot."""
    world = World(0, is_one_machine=False)
    rig = rig_of(world, num_workers=2, num_server_shards=2, snapshot_period_learner_steps=5)
    train(rig, 20)
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        lose(rig, "server shard 1")
        for leaves in rig.director.machine.server._snapshot.leaves:
            leaves.place.is_lost = True
        train(rig, 25)
    assert "the state of a shard was lost on its way: the server goes back" in caplog.text
    rest(rig)


def test_a_worker_does_not_act_with_other_parameters_than_those_that_it_was_to_pull():
    """Its next chunk was asked for when it counted as having parameters that were then lost on their way."""
    rig = rig_of(World(0, seconds={"publish": 5.0}), num_workers=1, num_server_shards=1)
    run(rig, lambda: rig.under_way["act"] == 2)
    lose(rig, "server shard 0")
    train(rig, 20)
    assert rig.director.num_restarts == 1


def test_a_worker_that_is_lost_begins_with_an_empty_replay_and_warms_up_again(caplog):
    rig = rig_of()
    director = rig.director
    train(rig, 30)
    env_steps = director.env_steps
    held = director.machine.actors.each[2].stats.num_transitions
    assert held > 0
    with caplog.at_level(logging.WARNING, logger="qfleet"):
        lose(rig, "worker 2")
    assert "worker 2 held" in caplog.text and "0 are back: there is no checkpoint that has them" in caplog.text
    assert director.counters["incarnations"] == [0, 0, 1, 0]
    train(rig, 120)
    assert director.env_steps > env_steps and director.machine.actors.each[2].stats.num_transitions > 0


@pytest.mark.parametrize("lost", [["worker 0"], ["worker 0", "server shard 0"], ["server shard 0", "worker 0"]])
def test_the_only_worker_and_the_server_do_not_wait_for_each_other_after_a_loss(lost):
    """The worker's replay is empty, and steps may be due: it must be asked for chunks, whatever is due."""
    rig = rig_of(num_workers=1, num_server_shards=1)
    train(rig, 30)
    for name in lost:
        lose(rig, name)
    train(rig, rig.director.learner_steps + 20)
