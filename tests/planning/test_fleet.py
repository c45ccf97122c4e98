"""The simulated run obeys the machine that directs the real one, and its speed follows from the costs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from qfleet.config import ActorLearnerConfig, GossipConfig, ParameterServerConfig, TrainConfig
from qfleet.planning.actor_learner import ActorLearnerModel
from qfleet.planning.cluster import Cluster, NodeGroup
from qfleet.planning.costs import Cost, Costs
from qfleet.planning.fleet import FleetModel
from qfleet.planning.gossip import GossipModel
from qfleet.planning.parameter_server import ParameterServerModel
from qfleet.planning.prediction import Speed
from qfleet.planning.simulated_run import Budget, decisions, endless, simulate
from qfleet.presets import make_config

MILLISECOND = 1e-3
COSTS: Costs = {
    "collect": Cost(MILLISECOND, num_bytes=1000),
    "collect, new parameters": Cost(MILLISECOND, num_bytes=1000),
    "insert": Cost(1e-6),
    "sample_share": Cost(1e-6, num_bytes=100),
    "learn": Cost(MILLISECOND, num_bytes=10),
    "set_priorities": Cost(1e-6),
    "publish": Cost(1e-6, num_bytes=50),
    "act": Cost(MILLISECOND),
    "act, new parameters": Cost(MILLISECOND),
    "compute_gradient": Cost(MILLISECOND, num_bytes=100),
    "compute_gradient, new parameters": Cost(MILLISECOND, num_bytes=100),
    "apply": Cost(1e-6, num_bytes=100),
    "average_gradients": Cost(1e-6),
    "call": Cost(1e-6),
    "turn": Cost(1e-6),
}
ROOM = Cluster(groups=(NodeGroup(cores=64),), is_here=True)
"""A machine on which no process waits for a core."""

NUM_BATCHES = 2
PATIENT = Budget(cpu_seconds=600.0)
"""Simulates as far on a slow machine as on a fast one."""


def config_of(topology: Any, **agent: Any) -> TrainConfig:
    config = make_config("CartPole-v1", "dqn", warmup_env_steps=100, **agent)
    return endless(dataclasses.replace(config, topology=topology))


def actor_learner(costs: Costs, cluster: Cluster = ROOM, **fields: Any) -> Speed:
    """Returns the speed of two actors with one lane each, in chunks of 10 rows, with a learner step for 10 of them."""
    settings: dict[str, Any] = {"num_actors": 2, "lanes_per_actor": 1, "rows_per_chunk": 10, **fields}
    config = config_of(ActorLearnerConfig(**settings), env_steps_per_learner_step=10.0)
    model = ActorLearnerModel(config, costs, NUM_BATCHES)
    return simulate(model, costs, cluster, settings["lanes_per_actor"] * 10, settings["num_actors"], PATIENT)


def test_a_slow_learner_sets_the_pace() -> None:
    """A round of two learner steps takes 10 ms, so the learner takes 200 a second, for 10 environment steps each."""
    speed = actor_learner({**COSTS, "learn": Cost(10 * MILLISECOND)})
    assert speed.learner_steps_per_second == pytest.approx(200, rel=0.05)
    assert speed.env_steps_per_second == pytest.approx(2000, rel=0.05)
    assert speed.limit.startswith("learner")
    assert any("actors wait" in wait for wait in speed.waits)


def test_slow_actors_set_the_pace() -> None:
    """Each of two actors takes 10 steps in 10 ms."""
    slow = Cost(10 * MILLISECOND)
    speed = actor_learner({**COSTS, "collect": slow, "collect, new parameters": slow})
    assert speed.env_steps_per_second == pytest.approx(2000, rel=0.05)
    assert speed.limit.startswith("actors")
    assert any("the learner waits" in wait for wait in speed.waits)


def test_another_actor_brings_what_it_should() -> None:
    slow = Cost(10 * MILLISECOND)
    costs = {**COSTS, "collect": slow, "collect, new parameters": slow}
    assert actor_learner(costs, num_actors=3).env_steps_per_second == pytest.approx(3000, rel=0.05)


def test_one_core_is_shared() -> None:
    """A round takes 20 ms of the core and its two chunks 20 ms, so there are 50 environment steps in 0.1 s."""
    slow = Cost(10 * MILLISECOND)
    costs = {**COSTS, "collect": slow, "collect, new parameters": slow, "learn": Cost(20 * MILLISECOND)}
    speed = actor_learner(costs, dataclasses.replace(ROOM, groups=(NodeGroup(cores=1),)))
    assert speed.env_steps_per_second == pytest.approx(500, rel=0.05)
    assert speed.limit.startswith("cores")


FOUR_CORES = dataclasses.replace(ROOM, groups=(NodeGroup(cores=4),))
"""One core fewer than processes."""


def test_a_process_that_goes_on_is_faster_than_one_that_begins_after_a_pause() -> None:
    """A learner that is behind never pauses: its round of two steps takes 10 ms, and not the 20 of a cold one."""
    costs = {**COSTS, "learn": Cost(10 * MILLISECOND), "learn, cold": Cost(20 * MILLISECOND)}
    assert actor_learner(costs, FOUR_CORES).learner_steps_per_second == pytest.approx(200, rel=0.1)


def test_a_process_that_waits_has_cold_caches_unless_it_has_a_core_of_its_own() -> None:
    slow = Cost(40 * MILLISECOND)
    costs = {**COSTS, "collect": slow, "collect, new parameters": slow, "learn, cold": Cost(4 * MILLISECOND)}
    for cluster, round_seconds in ((FOUR_CORES, 4 * MILLISECOND), (ROOM, MILLISECOND)):
        speed = actor_learner(costs, cluster)
        busy = speed.learner_steps_per_second / NUM_BATCHES * round_seconds
        assert speed.busy["learner"] == pytest.approx(busy, rel=0.1)


def test_an_idle_core_wakes_up_late() -> None:
    """One actor, one learner: the rounds follow each other, so what a message takes slows them down."""
    late = actor_learner({**COSTS, "wake": Cost(0.0, wait_seconds=5 * MILLISECOND)}, num_actors=1)
    assert late.env_steps_per_second < 0.9 * actor_learner(COSTS, num_actors=1).env_steps_per_second


def test_a_director_that_falls_behind_is_named() -> None:
    speed = actor_learner({**COSTS, "call": Cost(20 * MILLISECOND)})
    assert speed.limit.startswith("director")


def test_the_same_simulation_has_the_same_result() -> None:
    assert actor_learner(COSTS) == actor_learner(COSTS)


SPREAD = Cluster(
    groups=(
        NodeGroup(cores=8, roles=("director", "learner", "replay shard", "server shard")),
        NodeGroup(count=4, cores=4, roles=("actor", "worker", "peer")),
    ),
    latency_seconds=1e-4,
    call_seconds=1e-5,
)


def test_chunks_cross_the_wire_between_nodes() -> None:
    speed = actor_learner(COSTS, SPREAD)
    assert speed.wire_bytes_per_env_step == pytest.approx(1000 / 10, rel=0.2)
    assert actor_learner(COSTS).wire_bytes_per_env_step == 0
    assert actor_learner(COSTS).moved_bytes_per_env_step > 0


def test_a_slow_link_is_named() -> None:
    thin = tuple(dataclasses.replace(group, gigabits_per_second=1e-4) for group in SPREAD.groups)
    speed = actor_learner(COSTS, dataclasses.replace(SPREAD, groups=thin))
    assert speed.limit.startswith("busiest link")


def faulty(**fields: float) -> Cluster:
    return dataclasses.replace(SPREAD, lost_per_process_hour=600.0, restart_seconds=1.0, **fields)


def test_a_run_goes_on_while_processes_are_lost() -> None:
    speed, sound = actor_learner(COSTS, faulty()), actor_learner(COSTS, SPREAD)
    assert speed.num_lost >= 4
    assert 0.2 * sound.env_steps_per_second < speed.env_steps_per_second < sound.env_steps_per_second


def parameter_server(costs: Costs, cluster: Cluster = ROOM, **fields: Any) -> Speed:
    settings: dict[str, Any] = {"num_workers": 2, "lanes_per_worker": 1, "rows_per_chunk": 10, **fields}
    config = config_of(ParameterServerConfig(**settings), env_steps_per_learner_step=1.0)
    return simulate(ParameterServerModel(config, costs), costs, cluster, 10, settings["num_workers"], PATIENT)


@pytest.mark.parametrize("fields", [{}, {"num_replay_shards": 1}, {"num_server_shards": 2, "num_replay_shards": 2}])
def test_workers_share_acting_and_gradients(fields: Mapping[str, int]) -> None:
    """A worker takes 1 ms for 10 steps and 10 ms for their 10 gradients: two workers take 20 steps in 11 ms."""
    speed = parameter_server(COSTS, **fields)
    assert speed.env_steps_per_second == pytest.approx(20 / (11 * MILLISECOND), rel=0.15)
    assert speed.limit.startswith("workers")


def test_a_slow_server_sets_the_pace() -> None:
    speed = parameter_server({**COSTS, "apply": Cost(5 * MILLISECOND)}, gradients_per_learner_step=2, max_staleness=0)
    assert speed.learner_steps_per_second < 1 / (5 * MILLISECOND)


@pytest.mark.parametrize("fields", [{}, {"num_replay_shards": 1, "num_server_shards": 2}])
def test_a_parameter_server_goes_on_while_processes_are_lost(fields: Mapping[str, int]) -> None:
    speed = parameter_server(COSTS, faulty(), **fields)
    assert speed.num_lost >= 4
    assert speed.env_steps_per_second > 0


def gossip(cluster: Cluster, num_peers: int = 2) -> tuple[Speed, int]:
    """Returns the speed of peers with four lanes each, and the environment steps of a chunk."""
    topology = GossipConfig(num_envs=4 * num_peers, num_processes=num_peers)
    chunk = Cost(10 * MILLISECOND, num_bytes=40)
    costs = {**COSTS, "chunk": chunk, "chunk after averaging": dataclasses.replace(chunk, cpu_seconds=11 * MILLISECOND)}
    model = GossipModel(config_of(topology), costs)
    return simulate(model, costs, cluster, model.env_steps_per_chunk, num_peers, PATIENT), model.env_steps_per_chunk


def test_peers_take_chunks_on_their_own() -> None:
    """Each peer takes a chunk in 10 ms, and 1 ms more for an exchange at every other chunk."""
    speed, chunk = gossip(ROOM, 4)
    assert speed.env_steps_per_second == pytest.approx(4 * chunk / (10.5 * MILLISECOND), rel=0.1)


def test_gossip_goes_on_while_peers_are_lost() -> None:
    assert gossip(faulty())[0].num_lost >= 4


def test_a_thousand_actors_are_simulated() -> None:
    config = config_of(ActorLearnerConfig(num_actors=1000, lanes_per_actor=4, num_replay_shards=2), batch_size=64)
    nodes = (SPREAD.groups[0], NodeGroup(count=16, cores=64, roles=("actor",)))
    model = ActorLearnerModel(config, COSTS, 16)
    speed = simulate(model, COSTS, dataclasses.replace(SPREAD, groups=nodes), 128, 1000, Budget(100_000, 600.0))
    assert speed.busy["actor"] < 0.5
    assert speed.env_steps_per_second > 0


@pytest.mark.parametrize("topology", [ActorLearnerConfig(), ParameterServerConfig()])
def test_the_decisions_of_a_turn_are_timed(topology: Any) -> None:
    config = config_of(topology)
    is_of_actors = isinstance(topology, ActorLearnerConfig)
    model: FleetModel = ActorLearnerModel(config, COSTS, 2) if is_of_actors else ParameterServerModel(config, COSTS)
    next_turn = decisions(model, COSTS)
    assert next_turn() > 0
