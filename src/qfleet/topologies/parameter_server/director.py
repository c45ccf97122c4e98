"""The director of the parameter server: it carries out what `machine.ServerMachine` decides.

It starts the processes, and calls the method that belongs to each request: see `_call`. It also reads parameters and
snapshots for other threads.
"""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.core.sharded_learner import ShardedLearner, StateLeaves
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fleet.calls import ValueIsLost
from qfleet.topologies.fleet.machine_director import FleetDirector
from qfleet.topologies.fleet.messages import Begin, CallRequest, Started
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.remote_process import IN_LINE, ONE_CPU, RemoteProcess
from qfleet.topologies.fleet.sharded_replay import Insert, RestoreReplay, SampleShare, SetPriorities
from qfleet.topologies.parameter_server.machine import ServerMachine
from qfleet.topologies.parameter_server.remote import RemoteServerShard, RemoteWorker
from qfleet.topologies.parameter_server.requests import (
    Act,
    ApplyAverages,
    ApplyGradients,
    AverageGradients,
    ComputeGradient,
    ComputeGradientOf,
    Publish,
    ResetShard,
    RestoreShard,
    TakeSnapshot,
)
from qfleet.topologies.parameter_server.sharded_server import SavedServer
from qfleet.topologies.parameter_server.stats import ServerStats

T = TypeVar("T")

_Replies = tuple[int, list[Reference[T]]]
"""The number of the learner step after which the shards have replied, and a reference to what each has replied."""


class ServerDirector(FleetDirector[ServerStats, ServerMachine]):
    """Coordinates the workers, the parameter server, and the replay if the workers share one."""

    _needs_in_words = "all shards of the server and of the replay, and a worker"
    _resource_flags = "--worker-resources"

    def __init__(
        self,
        config: TrainConfig,
        learner: ShardedLearner,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
    ) -> None:
        """Starts nothing yet.

        Args:
          config: config of the run.
          learner: the learner that is divided over the server's shards.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads the replay of a checkpoint, as one for all workers.
        """
        self._config, self._topology, self._learner = config, config.topology_as(ParameterServerConfig), learner
        machine = ServerMachine(config, learner.num_params)
        super().__init__(self._topology, self._topology.actor_pool, machine, read_learner, read_replay)

    def _call(self, request: CallRequest[Any]) -> None:
        match request:
            case Begin():
                self._submit(request, RemoteWorker.begin, request.incarnation)
            case Act():
                self._submit(request, RemoteWorker.act, request.pull, request.exploration)
            case Insert(segment=segment, arrived=arrived):
                insert = RemoteReplayShard.insert
                self._submit(request, insert, segment, arrived.writer, arrived.chunk, is_repeated=True)
            case SampleShare():
                self._submit(
                    request, RemoteReplayShard.sample_share, request.number, request.seed, request.importance_exponent,
                    request.share, request.most,
                )  # fmt: skip
            case ComputeGradient():
                self._submit(request, RemoteWorker.compute_gradient, request.pull, request.importance_exponent)
            case ComputeGradientOf(pull=pull, drawn=drawn):
                self._submit(request, RemoteWorker.compute_gradient_of, pull, drawn.places, drawn.transitions)
            case SetPriorities():
                self._submit(request, RemoteReplayShard.set_priorities, request.number, request.priority)
            case ApplyGradients():
                self._submit(request, RemoteServerShard.apply_gradients, request.gradients)
            case AverageGradients():
                self._submit(request, RemoteServerShard.average_gradients, request.gradients)
            case ApplyAverages():
                self._submit(request, RemoteServerShard.apply_averages, request.squared_norms)
            case Publish():
                self._submit(request, RemoteServerShard.publish)
            case TakeSnapshot():
                self._submit(request, RemoteServerShard.take_snapshot)
            case RestoreShard():
                self._submit(request, RemoteServerShard.restore, request.leaves)
            case ResetShard():
                self._submit(request, RemoteServerShard.reset)
            case RestoreReplay() if not self.machine.shares_replay:
                self._submit(request, RemoteWorker.restore, request.saved)
            case RestoreReplay():
                self._submit(request, RemoteReplayShard.restore, request.saved)
            case _:
                raise TypeError(f"no method belongs to {request}")

    # --- For other threads ---

    def params(self) -> list[Any]:
        """Returns each shard's piece of the newest parameters, all after the same step."""
        return self._values_of_server(RemoteServerShard.params, gives_up=False)[1]

    def learner_state(self) -> tuple[int, list[StateLeaves]]:
        """Returns the learner steps of the server's state, and what each shard must keep of it.

        The steps are those of this state. The server may go back to an earlier one as soon as the shards have replied.

        Raises:
          StateIsLost: if a shard was lost and has not found a place yet.
        """
        return self._values_of_server(RemoteServerShard.take_snapshot, gives_up=True)

    def snapshots(self) -> Iterator[SavedReplay]:
        """Yields the contents of each shard of the replay, or of each worker's own; only one at a time is held here.

        Raises:
          StateIsLost: if one was lost and has not found a place yet.
        """
        method = RemoteReplayShard.snapshot if self.machine.shares_replay else RemoteWorker.snapshot
        for process in self._replays:
            yield self._value_of(process, method, gives_up=True)

    def _values_of_server(self, method: Callable[[Any], Reference[T]], *, gives_up: bool) -> tuple[int, list[T]]:
        """Returns the number of the learner step after which all shards reply, and what each replies.

        If the server goes back before all have replied, or a reply is lost with the node that kept it, all are asked
        again.
        """
        while True:
            answer: concurrent.futures.Future[_Replies[T] | None] = concurrent.futures.Future()
            self._post(functools.partial(self._ask_server, method, answer))
            replies = self._wait_for(answer, self._servers if gives_up else [])
            if replies is not None:
                learner_steps, references = replies
                with contextlib.suppress(ValueIsLost):
                    return learner_steps, [self._supervisor.value(reference) for reference in references]

    def _ask_server(
        self,
        method: Callable[[RemoteServerShard], Reference[T]],
        answer: concurrent.futures.Future[_Replies[T] | None],
    ) -> None:
        """Calls a method of all shards. The answer is None if the server has gone back before all have replied.

        Then a shard was lost, or a state on its way to a shard, which has replied without it.
        """
        queue = self.machine.server.queue
        learner_steps, version = queue.learner_steps, queue.version  # of all steps that were requested before
        references = [Reference[T]() for _ in self._servers]
        num_left = len(references)

        def replied(_: Reference[T]) -> None:
            nonlocal num_left
            num_left -= 1
            if not num_left:
                answer.set_result((learner_steps, references) if queue.is_current(version) else None)

        def dropped() -> None:
            if not answer.done():
                answer.set_result(None)

        for process, reference in zip(self._servers, references, strict=True):
            self._supervisor.submit(process, method, on_reply=replied, on_dropped=dropped, results=[reference])

    # --- Processes and checkpoints ---

    @property
    def _servers(self) -> list[RemoteProcess[RemoteServerShard]]:
        return [self._processes[shard] for shard in self.machine.server.shards]

    @property
    def _replays(self) -> list[RemoteProcess[Any]]:
        """The processes that keep the shared replay, or each its own."""
        return self._shards if self.machine.shares_replay else self._actors

    def _make_stats(self) -> ServerStats:
        return ServerStats(self._topology.num_workers)

    def _saved_learner(self, learner: LearnerState) -> SavedServer:
        return SavedServer(int(learner.target_age), [Reference(leaves) for leaves in self._learner.split(learner)])

    def _resources(self) -> list[Mapping[str, float]]:
        topology = self._topology
        each: Mapping[str, float] = topology.worker_resources or ONE_CPU
        return [each] * topology.num_workers + [ONE_CPU] * (topology.num_server_shards + topology.num_replay_shards)

    def _needed(self) -> list[RemoteProcess]:
        return [*self._servers, *(self._shards if self.machine.shares_replay else [])]

    def _vital(self) -> list[RemoteProcess]:
        return [*self._servers, *self._replays]

    def _start_processes(self) -> None:
        topology = self._topology
        resources = dict(topology.worker_resources) or ONE_CPU
        environment = {} if resources.get("GPU") else IN_LINE
        for i, shard in enumerate(self.machine.server.shards):
            arguments, labels = (self._config, i), topology.server_node_labels
            self._start_process(shard, RemoteServerShard, arguments, ONE_CPU, IN_LINE, labels)
        for i, shard in enumerate(self.machine.replay.shards if self.machine.shares_replay else []):
            arguments, labels = (self._config, i), topology.replay_node_labels
            self._start_process(shard, RemoteReplayShard, arguments, ONE_CPU, IN_LINE, labels)
        for i, worker in enumerate(self.machine.actors.each):
            arguments, labels = (self._config, i), topology.worker_node_labels
            self._start_process(worker.process, RemoteWorker, arguments, resources, environment, labels)
        self._tell(Started())
