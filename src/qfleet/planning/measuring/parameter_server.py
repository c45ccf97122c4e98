"""The calls by which the parts of a parameter-server run are measured: a worker, the server, a shard of the replay."""

from typing import Any

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.planning.costs import Cost
from qfleet.planning.measuring.actor_learner import NUM_ROUNDS, fill, sample
from qfleet.planning.measuring.calls import Caller, ServedProcess, caller
from qfleet.planning.parameter_server import ParameterServerModel
from qfleet.planning.simulated_run import decisions, endless
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.remote_process import IN_LINE
from qfleet.topologies.fleet.replay_shard import ShardStats, Writer
from qfleet.topologies.parameter_server.remote import RemoteServerShard, RemoteWorker
from qfleet.topologies.parameter_server.requests import Pull


def measure_parameter_server(config: TrainConfig) -> dict[str, Cost]:
    """Returns the costs of the methods of worker, server and shard of the replay, and of the director's own part."""
    with caller(config) as calls:
        config = config.with_schedule_lengths()
        fleet, topology = _Fleet(calls, config), config.topology_as(ParameterServerConfig)
        wake = calls.wake_cost(fleet.servers[0])

        def rounds() -> None:
            for number in range(NUM_ROUNDS):
                fleet.one_of_each(number)

        calls.measure(rounds, 1 + topology.num_workers + topology.num_server_shards + topology.num_replay_shards)
        found = calls.costs()
        decide = decisions(ParameterServerModel(endless(config), found), found)
        own = calls.direct(fleet.servers[0], lambda: fleet.one_of_each(NUM_ROUNDS), decide)
        return {**found, **own, "wake": wake}


class _Fleet:
    """One worker, all shards of the server, and one shard of the replay if the workers share one."""

    def __init__(self, calls: Caller, config: TrainConfig) -> None:
        self._calls, self._config = calls, config
        self._topology = topology = config.topology_as(ParameterServerConfig)
        self.servers = [
            calls.start(f"server shard {i}" if i else "server shard", RemoteServerShard, (config, i), dict(IN_LINE))
            for i in range(topology.num_server_shards)
        ]
        self._shard: ServedProcess | None = None
        if topology.num_replay_shards:
            self._shard = calls.start("replay shard", RemoteReplayShard, (config, 0), dict(IN_LINE))
        self._worker = calls.start("worker", RemoteWorker, (config, 0), dict(IN_LINE))
        self._clips_together = len(self.servers) > 1 and config.agent.max_gradient_norm is not None
        self._version, self._params, self._target = 0, self._references(), self._references()
        for server, params, target in zip(self.servers, self._params, self._target, strict=True):
            calls.call(server, "publish", RemoteServerShard.publish, results=[params, target])
        self._known, self._num_chunks, self._has_target = -1, 0, False
        calls.call(self._worker, "begin", RemoteWorker.begin, 0)
        self._stats = fill(self._act)

    def _references(self) -> list[Reference[Any]]:
        return [Reference() for _ in self.servers]

    def _pull(self) -> tuple[Pull, str]:
        """Returns what the worker must pull, and what that adds to the name of the cost."""
        if self._known == self._version:
            return Pull(self._version), ""
        pull = Pull(self._version, tuple(self._params), () if self._has_target else tuple(self._target))
        self._known, self._has_target = self._version, True
        return pull, ", new parameters"

    def _act(self) -> ShardStats:
        pull, more = self._pull()
        results = [Reference[Any]()] if self._shard else []
        answer = self._calls.call(self._worker, f"act{more}", RemoteWorker.act, pull, 0.1, results=results)
        if self._shard is None:
            stats: ShardStats = answer.shard_stats
            return stats
        writer, self._num_chunks = Writer(0, self._num_chunks), self._num_chunks + 1
        reply = self._calls.call(self._shard, "insert", RemoteReplayShard.insert, 0, writer, results[0])
        stats = reply.stats
        return stats

    def one_of_each(self, number: int) -> None:
        """Acts, computes a gradient and applies it, each once; every other time the worker pulls before it acts."""
        if number % 2:
            self._stats = self._act()
        pieces = self._gradient(number)
        self._apply([list(pieces)] * self._topology.gradients_per_learner_step)
        if not number % 2:
            self._stats = self._act()

    def _gradient(self, number: int) -> list[Reference[Any]]:
        (pull, more), pieces = self._pull(), self._references()
        name, batch_size = f"compute_gradient{more}", self._config.agent.batch_size
        if self._shard is None:
            self._calls.call(self._worker, name, RemoteWorker.compute_gradient, pull, 0.5, results=pieces)
            return pieces
        num_shards = self._topology.num_replay_shards
        counts = [len(each) for each in np.array_split(np.arange(batch_size), num_shards)]
        drawn = sample(self._calls, self._shard, number, counts, self._stats)
        places = np.split(np.arange(batch_size, dtype=np.uint32), np.cumsum(counts)[:-1])
        priorities = [Reference[Any]() for _ in counts]
        self._calls.call(
            self._worker, name, RemoteWorker.compute_gradient_of, pull, places, drawn, results=[*pieces, *priorities]
        )
        self._calls.call(self._shard, "set_priorities", RemoteReplayShard.set_priorities, number, priorities[0])
        return pieces

    def _apply(self, gradients: list[list[Reference[Any]]]) -> None:
        """Applies gradients; each is a list of pieces, one for each shard of the server."""
        of_shards = list(zip(*gradients, strict=True))
        params, norms = self._references(), self._references()
        if self._clips_together:
            for server, own, norm in zip(self.servers, of_shards, norms, strict=True):
                self._calls.call(server, "average_gradients", RemoteServerShard.average_gradients, own, results=[norm])
        for i, server in enumerate(self.servers):
            # A step that updates the target network replies with two vectors.
            updates = (self._version + 1) % self._config.agent.target_update_period == 0
            results = [params[i], *([self._target_of_step(i)] if updates else [])]
            if self._clips_together:
                self._calls.call(server, "apply", RemoteServerShard.apply_averages, norms, results=results)
            else:
                self._calls.call(server, "apply", RemoteServerShard.apply_gradients, of_shards[i], results=results)
        self._version, self._params = self._version + 1, params

    def _target_of_step(self, shard: int) -> Reference[Any]:
        self._target[shard], self._has_target = Reference(), False
        return self._target[shard]
