"""The calls by which the parts of an actor-learner run are measured: an actor, a shard of the replay, the learner."""

import dataclasses
from typing import Any

import numpy as np

from qfleet.config import ActorLearnerConfig, RunFailed, TrainConfig
from qfleet.core.replay import DrawShare
from qfleet.planning.actor_learner import ActorLearnerModel
from qfleet.planning.costs import COLD, Cost
from qfleet.planning.measuring.calls import Caller, ServedProcess, caller
from qfleet.planning.simulated_run import decisions, endless
from qfleet.runtime.child_process import visible_gpus
from qfleet.topologies.actor_learner.learner import batches_per_round
from qfleet.topologies.actor_learner.remote import RemoteActor, RemoteLearner
from qfleet.topologies.fleet.env_and_agent import make_env_and_agent
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.remote_process import IN_LINE
from qfleet.topologies.fleet.replay_shard import ShardStats, Writer

NUM_ROUNDS = 20
"""Rounds of calls that are measured. The first of each kind compiles, and doesn't count."""

MOST_CHUNKS = 2_000
"""Chunks after which the replay must have something to learn from."""


def measure_actor_learner(config: TrainConfig) -> dict[str, Cost]:
    """Returns the costs of the methods of actor, shard and learner, by name, and of the director's own part."""
    config = config.with_schedule_lengths()
    topology = config.topology_as(ActorLearnerConfig)
    num_batches = batches_per_round(config, make_env_and_agent(config).env.spec)
    num_draws = num_batches * config.agent.batch_size
    with caller(config) as calls:
        learner = calls.start("learner", RemoteLearner, (config,), {} if visible_gpus() else {"JAX_PLATFORMS": "cpu"})
        shard = calls.start("replay shard", RemoteReplayShard, (config, 0), dict(IN_LINE))
        actor = calls.start("actor", RemoteActor, (config, 0), dict(IN_LINE))
        wide_lanes = dataclasses.replace(topology, lanes_per_actor=2 * topology.lanes_per_actor)
        wide_config = dataclasses.replace(config, topology=wide_lanes)
        wide = calls.start("actor with twice the lanes", RemoteActor, (wide_config, 0), dict(IN_LINE))
        for each in (actor, wide):
            calls.call(each, "begin", RemoteActor.begin, 0)
        counts = [len(each) for each in np.array_split(np.arange(num_draws), topology.num_replay_shards)]
        actors, version, params = _Actors(calls, actor, wide, shard), 0, Reference[Any]()
        calls.call(learner, "publish", RemoteLearner.publish, results=[params])
        stats, wake = actors.fill(version, params), calls.wake_cost(shard)

        def one_of_each(number: int) -> None:
            nonlocal version, params, stats
            drawn = sample(calls, shard, number, counts, stats)
            places = np.split(np.arange(num_draws, dtype=np.uint32), np.cumsum(counts)[:-1])
            for label in ("learn" + COLD, "learn"):  # once after a pause, and once more without
                priorities = [Reference[Any]() for _ in counts]
                calls.call(learner, label, RemoteLearner.learn, places, drawn, results=priorities)
            for priority in priorities[:1]:
                stats = calls.call(shard, "set_priorities", RemoteReplayShard.set_priorities, number, priority)
            if number % 2:
                version, params = version + 1, Reference()
                calls.call(learner, "publish", RemoteLearner.publish, results=[params])
            stats = actors.act(version, params)

        def rounds() -> None:
            for number in range(NUM_ROUNDS):
                one_of_each(number)

        calls.measure(rounds, 2 + topology.num_replay_shards + topology.num_actors)
        found = calls.costs()
        model = ActorLearnerModel(endless(config), found, num_batches)
        return {**found, **calls.direct(shard, lambda: one_of_each(NUM_ROUNDS), decisions(model, found)), "wake": wake}


class _Actors:
    """Has the two actors act, and the shard store what the narrow one did."""

    def __init__(self, calls: Caller, actor: ServedProcess, wide: ServedProcess, shard: ServedProcess) -> None:
        self._calls, self._actor, self._wide, self._shard = calls, actor, wide, shard
        self._versions = {actor: -1, wide: -1}
        self._num_chunks = 0

    def act(self, version: int, params: Reference[Any]) -> ShardStats:
        """Takes a chunk with each actor, and returns what the shard holds with that of the narrow one."""
        chunk = self._collect(self._actor, version, params, "collect")
        self._collect(self._wide, version, params, "collect, twice the lanes")
        return self._insert(chunk)

    def fill(self, version: int, params: Reference[Any]) -> ShardStats:
        """Fills the shard until there is something to learn from."""
        return fill(lambda: self._insert(self._collect(self._actor, version, params, "collect")))

    def _collect(self, actor: ServedProcess, version: int, params: Reference[Any], label: str) -> Reference[Any]:
        label += ", new parameters" if version != self._versions[actor] else ""
        self._versions[actor], chunk = version, Reference[Any]()
        self._calls.call(actor, label, RemoteActor.collect, version, params, 0.1, results=[chunk])
        return chunk

    def _insert(self, chunk: Reference[Any]) -> ShardStats:
        writer, self._num_chunks = Writer(0, self._num_chunks), self._num_chunks + 1
        reply = self._calls.call(self._shard, "insert", RemoteReplayShard.insert, 0, writer, chunk)
        stats: ShardStats = reply.stats
        return stats


def fill(store: Any) -> ShardStats:
    """Stores chunks until there is something to learn from.

    Args:
      store: makes and stores a chunk, and returns what the shard holds.

    Raises:
      RunFailed: if there is nothing after many chunks.
    """
    for _ in range(MOST_CHUNKS):
        stats: ShardStats = store()
        if stats.total_priority > 0 and stats.num_transitions > 0:
            return stats
    raise RunFailed(f"the replay had nothing to learn from after {MOST_CHUNKS} chunks, so learning can't be measured")


def sample(
    calls: Caller, shard: ServedProcess, number: int, counts: list[int], stats: ShardStats
) -> list[Reference[Any]]:
    """Has a shard draw as many shares as the run has shards, and returns them."""
    drawn = [Reference[Any]() for _ in counts]
    for i, (reference, count) in enumerate(zip(drawn, counts, strict=True)):
        share = DrawShare(np.int32(count), np.float32(1 / len(counts)), np.float32(stats.num_transitions))  # type: ignore[arg-type]
        arguments = (number + i * 10_000, number, 0.5, share, sum(counts))
        calls.call(shard, "sample_share", RemoteReplayShard.sample_share, *arguments, results=[reference])
    return drawn
