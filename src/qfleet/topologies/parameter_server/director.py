"""The director of the parameter server: it coordinates the workers, the server, and the replay.

This file has the workers' half: their chunks, their parameters, and their replacement. `gradient_requests` asks the
workers for gradients, and `sharded_server` has the server's half.
"""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import exploration_at
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.core.sharded_learner import ShardedLearner, StateLeaves
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.actors_director import ActorsDirector, PoolStats
from qfleet.topologies.fleet.calls import ValueIsLost
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.replay_shard import Writer
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.supervisor import IN_LINE, ONE_CPU, RemoteProcess
from qfleet.topologies.parameter_server.gradient_requests import GradientRequests
from qfleet.topologies.parameter_server.remote import ChunkAnswer, RemoteServerShard, RemoteWorker
from qfleet.topologies.parameter_server.sharded_server import ServerEvents, ShardedServer
from qfleet.topologies.parameter_server.step_queue import Admission
from qfleet.topologies.parameter_server.worker import GradientStats
from qfleet.topologies.parameter_server.worker_pool import PooledWorker, WorkerReplays

T = TypeVar("T")


class ServerStats(PoolStats):
    """What happened since the last record. Losses, TD errors and staleness are those of gradients that were applied."""

    def __init__(self, num_workers: int) -> None:
        """Begins with nothing."""
        super().__init__(num_workers, ("workers", "server", "shards"))
        self.losses: list[float] = []
        self.td_errors: list[float] = []
        self.num_gradients = {"applied": 0, "stale": 0, "outlier": 0}
        self.pushed_bytes = 0

    def count_gradient(self, result: GradientStats, num_bytes: int, admission: Admission) -> None:
        """Counts a gradient that has arrived. Those that are applied count once their step is sent."""
        self.pushed_bytes += num_bytes
        if admission.decision == "applied":
            self.staleness.append(admission.staleness)
            self.losses.append(result.loss)
            self.td_errors.append(result.td_error)
        else:
            self.num_gradients[admission.decision] += 1


class ServerDirector(ActorsDirector[ServerStats, PooledWorker]):
    """Coordinates the workers, the parameter server, and the replay if the workers share one."""

    _needs_in_words = "all shards of the server and of the replay, and a worker"
    _resource_flags = "--worker-resources"
    fixed_exploration: float | None = None
    """Exploration that replaces its schedule; None for the schedule."""

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
        topology = config.topology_as(ParameterServerConfig)
        self._topology, self._learner, self._read_learner = topology, learner, read_learner
        super().__init__(
            config, topology.actor_pool, 1, read_replay, ray_address=topology.ray_address,
            silence_seconds=topology.silence_seconds, max_restarts=topology.max_restarts,
        )  # fmt: skip
        events = ServerEvents(
            functools.partial(self._note_busy, "server"), self._server_was_sent_steps, self._server_went_back
        )
        self._server = ShardedServer(config, learner, self._supervisor, events, self._newest_learner)
        self._replay = None
        if self._topology.num_replay_shards:
            note_busy = functools.partial(self._note_busy, "shards")
            self._replay = ShardedReplay(config.seed, self._pool, self._supervisor, note_busy)
        self._replays = self._replay or WorkerReplays(self._actors, self._topology.actor_pool, self._supervisor)
        """The shared replay, or those of all workers."""
        self._gradient_requests = GradientRequests(
            config, self._supervisor, self._server, self._replay, on_request=self._note_request,
            on_gradient=self._gradient_arrived,
        )  # fmt: skip
        gradient_bytes = {"float32": 4, "bfloat16": 2}[self._topology.gradient_dtype]
        self._gradient_bytes = gradient_bytes * learner.num_params

    # --- For other threads ---

    @property
    def version(self) -> int:
        """Version of the newest parameters; it never decreases."""
        return self._server.version

    @property
    def num_transitions(self) -> int:
        """Transitions in the shared replay, or in the replays of all workers."""
        return self._replays.num_transitions

    def params(self) -> list[np.ndarray]:
        """Returns each shard's piece of the newest parameters, all after the same step."""
        return self._values_of_server(RemoteServerShard.saved_params, gives_up=False)

    def learner_state(self) -> list[StateLeaves]:
        """Returns what each shard of the server must keep, all after the same step.

        Raises:
          StateIsLost: if a shard was lost and has not found a place yet.
        """
        return self._values_of_server(RemoteServerShard.saved, gives_up=True)

    def snapshots(self) -> Iterator[SavedReplay]:
        """Yields the contents of each shard of the replay, or of each worker's own; only one at a time is held here.

        Raises:
          StateIsLost: if one was lost and has not found a place yet.
        """
        for process in self._replays.processes:
            method = RemoteReplayShard.saved if self._replay is not None else RemoteWorker.saved
            yield self._value_of(process, method, gives_up=True)

    def _values_of_server(self, method: Callable[[Any], Reference[T]], *, gives_up: bool) -> list[T]:
        """Returns what each shard replies, all between the same two steps.

        If a shard is lost before it has replied, or its reply is lost with the node that kept it, all are asked again.
        """
        while True:
            answer: concurrent.futures.Future[list[Reference[T]] | None] = concurrent.futures.Future()
            self._post(functools.partial(self._server.ask_all, method, answer.set_result))
            references = self._wait_for(answer, [*self._server.processes] if gives_up else [])
            if references is not None:
                with contextlib.suppress(ValueIsLost):
                    return [self._supervisor.value(reference) for reference in references]

    # --- What its own thread does ---

    def _new_stats(self) -> ServerStats:
        return ServerStats(self._topology.num_workers)

    def _resources(self) -> list[Mapping[str, float]]:
        topology = self._topology
        each: Mapping[str, float] = topology.worker_resources or ONE_CPU
        return [each] * topology.num_workers + [ONE_CPU] * (topology.num_server_shards + topology.num_replay_shards)

    def _missing(self) -> RemoteProcess | None:
        needed: list[RemoteProcess] = [
            *self._server.processes,
            *(self._replay.processes if self._replay is not None else []),
        ]
        missing = next((process for process in needed if not process.is_ready), None)
        return missing or (None if self.num_ready_actors else self._actors[0].process)

    def _vital(self) -> list[RemoteProcess]:
        return [*self._server.processes, *self._replays.processes]

    def _is_busy(self) -> bool:
        is_any_worker_busy = any(worker.num_chunks or worker.is_learning for worker in self._actors)
        return is_any_worker_busy or self._server.is_stepping or (self._replay is not None and self._replay.is_busy)

    def _issue(self) -> None:
        self._server.ensure_published()
        self._issue_chunks()
        self._issue_gradients()
        self._server.take_snapshot_if_due()

    # --- The server ---

    def _server_was_sent_steps(self, num_steps: int, num_gradients: int) -> None:
        self.learner_steps = self._server.learner_steps
        self._stats.learner_steps += num_steps
        self._stats.num_gradients["applied"] += num_gradients

    def _server_went_back(self, num_dropped: int) -> None:
        self.learner_steps = self._server.learner_steps
        self._stats.num_gradients["stale"] += num_dropped
        self._warm_up_if_empty()

    def _newest_learner(self) -> tuple[LearnerState, int] | None:
        newest = self._of_newest_checkpoint(self._read_learner)
        return (newest[0], newest[1]["learner_steps"]) if newest else None

    # --- Workers: chunks and gradients ---

    def _begin(self, i: int, incarnation: int) -> None:
        self._actors[i].pull_all_again()
        super()._begin(i, incarnation)

    def _ask_for_chunk(self, i: int, writer: Writer) -> None:
        worker = self._actors[i]
        newest = self._server.newest
        pull = worker.next_pull(newest)

        def ended() -> None:
            worker.num_chunks -= 1

        def arrived(answer: ChunkAnswer) -> None:
            worker.has_pulled(newest)
            count = functools.partial(self._count, i, answer.chunk_stats)
            if self._replay is not None:
                assert answer.chunk is not None
                self._replay.store(i, writer, answer.chunk, count, ended)
                return
            assert answer.shard_stats is not None
            worker.stats = answer.shard_stats
            count()
            ended()

        def lost() -> None:
            ended()
            worker.pull_all_again()
            self._server.note_failed_pull(pull)

        exploration = self.fixed_exploration
        if exploration is None:
            exploration = float(exploration_at(self._config.agent, np.array(self.env_steps)))
        self._supervisor.submit(
            worker.process, RemoteWorker.pull_and_act, pull, exploration, on_reply=arrived, on_dropped=lost,
            num_references=0 if self._replay is None else 1,
        )  # fmt: skip

    def _count(self, i: int, report: ChunkStats) -> None:
        super()._count(i, report)
        self._note_busy("workers", report.busy_seconds)

    def _issue_gradients(self) -> None:
        num_due_steps = self.rate_limiter.due(self.env_steps) - self.learner_steps
        self._gradient_requests.issue([self._actors[i] for i in self._in_turn()], num_due_steps, self.env_steps)

    def _gradient_arrived(self, result: GradientStats, admission: Admission) -> None:
        self._note_busy("workers", result.busy_seconds)
        self._stats.count_gradient(result, self._gradient_bytes, admission)

    # --- Start and replacement ---

    def _worker_is_lost(self, i: int) -> None:
        self._actor_is_lost(i)
        if isinstance(self._replays, WorkerReplays):
            newest = self._of_newest_checkpoint(self._read_replay) if self._config.checkpoint_replay else None
            self._replays.refill(i, newest)
            self._warm_up_if_empty()

    def _can_learn(self) -> bool:
        return any(map(self._gradient_requests.is_warm, self._actors)) if self._replay is None else super()._can_learn()

    def _start_processes(self) -> None:
        topology, make, add, config = self._topology, self._make_process, self._supervisor.add, self._config
        resources = dict(topology.worker_resources) or ONE_CPU
        environment = {} if resources.get("GPU") else IN_LINE
        for i in range(topology.num_server_shards):
            name, on_lost = f"server shard {i}", functools.partial(self._server.shard_was_lost, i)
            self._server.add(add(make(name, RemoteServerShard, (config, i), ONE_CPU, IN_LINE, on_lost)))
        if self._replay is not None:
            for i in range(topology.num_replay_shards):
                name, on_lost = f"replay shard {i}", functools.partial(self._shard_is_lost, i)
                self._replay.add(add(make(name, RemoteReplayShard, (config, i), ONE_CPU, IN_LINE, on_lost)))
        for i in range(topology.num_workers):
            name, on_lost = f"worker {i}", functools.partial(self._worker_is_lost, i)
            worker = make(name, RemoteWorker, (config, i), resources, environment, on_lost)
            self._actors.append(PooledWorker(add(worker)))
            self._begin(i, 0)

    def _restore_processes(self, state: dict[str, Any], incarnation: int, version: int) -> None:
        self._server.restore(state["learner"], self.learner_steps, version + 1)
        for i in range(len(self._actors)):
            self._begin(i, incarnation)
        if self._replay is not None:
            self._replay.resume_at(self.env_steps)
        if "replay" in state:
            for i in range(len(self._replays.processes)):
                self._replays.give(i, state["replay"])
