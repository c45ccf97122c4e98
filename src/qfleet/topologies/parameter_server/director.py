"""Who directs workers and server. See `qfleet.topologies.parameter_server`."""

import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import ray

from qfleet.config import ParameterServerConfig, TrainConfig
from qfleet.core.exploration import exploration_at, importance_exponent_at
from qfleet.core.learner import LearnerState
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.fleet.actor import Report
from qfleet.topologies.fleet.actors_director import ActorsDirector, PooledActor, PoolStats
from qfleet.topologies.fleet.replay_shard import EMPTY_SHARD, ShardStats, Writer, share_of
from qfleet.topologies.fleet.sharded_replay import ShardedReplay
from qfleet.topologies.fleet.supervisor import IN_LINE, ONE_CPU, RemoteProcess, has_failed
from qfleet.topologies.parameter_server.gradient_filter import Gate
from qfleet.topologies.parameter_server.remote import RemoteReplayShard, RemoteServerShard, RemoteWorker
from qfleet.topologies.parameter_server.server_shard import Division, Leaves, TargetClock
from qfleet.topologies.parameter_server.transport import Vector, Vectors, handed_out, needs_of, to_pull
from qfleet.topologies.parameter_server.worker import Lesson

logger = logging.getLogger("qfleet")


class ServerTally(PoolStats):
    """What happened since the last record; losses, TD errors and staleness are those of gradients that were applied."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers, ("workers", "server", "shards"))
        self.losses: list[float] = []
        self.td_errors: list[float] = []
        self.num_gradients = {"applied": 0, "stale": 0, "outlier": 0}
        self.pushed_bytes = 0


class _Parameters(NamedTuple):
    """Parameters that workers can pull."""

    version: int
    """Steps that the server had been sent, in all of its lives: it counts up, whatever happens to the server."""
    params: Vector
    target_version: int
    """Of the first parameters with this target network."""
    target_params: Vector


class _Snapshot(NamedTuple):
    """A copy of the server's state, all shards after the same step."""

    learner_steps: int
    target_age: int
    leaves: list[Any]
    """References to each shard's."""


@dataclasses.dataclass
class _Worker(PooledActor):
    """What this process knows of a worker."""

    is_learning: bool = False
    """Whether it was asked for a gradient."""
    version: int = -1
    """Of the parameters that it was sent last."""
    target_version: int = -1
    """The same, of the target network."""
    stock: ShardStats = EMPTY_SHARD
    """Of its own replay."""


class ServerDirector(ActorsDirector[ServerTally, _Worker]):
    """Directs the workers, the server, and the replay if they share one."""

    _needs_in_words = "all shards of the server and of the replay, and a worker"
    _resource_flags = "--worker-resources"

    def __init__(
        self,
        config: TrainConfig,
        division: Division,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          division: of the learner over the server's shards.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads its replay, as one for all workers.
        """
        self._topology = config.topology_as(ParameterServerConfig)
        self._division, self._read_learner = division, read_learner
        super().__init__(config, 1, read_replay)
        self.version = 0
        """Steps that the server was sent, whatever has become of them: it never goes back."""
        self._gate = Gate(self._topology)
        self._server: list[RemoteProcess] = []
        self._replay: ShardedReplay | None = None
        if self._topology.num_replay_shards:
            self._replay = ShardedReplay(config, self._supervisor, functools.partial(self._note_busy, "shards"))
        self._parameters: _Parameters | None = None
        self._target_clock = TargetClock(config.agent.target_update_period)
        self._is_asked_for_snapshot = False
        self._snapshot: _Snapshot | None = None
        self._vectors = Vectors(self._topology, division)
        self._gradients: list[Vector] = []  # of the next step
        self._waiting: list[list[Vector]] = []  # gradients of steps that the server is to be sent
        self._is_stepping = False  # whether it was sent some, and has not taken them on all shards yet

    # --- For other threads ---

    @property
    def num_transitions(self) -> int:
        """That the replay holds, or all workers' own."""
        if self._replay is not None:
            return self._replay.num_transitions
        return sum(worker.stock.num_transitions for worker in self._actors)

    def params(self) -> list[np.ndarray]:
        """Returns each shard's piece of the newest parameters, all after the same step."""
        return self._of_server("params", 3, gives_up=False)

    def learner_state(self) -> list[Leaves]:
        """Returns what each shard of the server must keep, all after the same step.

        Raises:
          StateIsLost: if one has no place.
        """
        return self._of_server("state", 2, gives_up=True)

    def snapshots(self) -> Iterator[SavedReplay]:
        """Yields what each shard of the replay, or each worker's own, keeps; one at a time is held here.

        Raises:
          StateIsLost: if one has no place.
        """
        for process in self._keepers():
            yield self._answer_of(process, "snapshot", gives_up=True)

    def _of_server(self, method: str, num_returns: int, *, gives_up: bool) -> list[Any]:
        """Returns what each shard returns second, all after the same step; asked again if one is lost at it."""
        while True:
            answer: concurrent.futures.Future = concurrent.futures.Future()
            lost = functools.partial(answer.set_result, None)
            self._post(functools.partial(self._ask_server, method, num_returns, answer.set_result, lost))
            while not answer.done():
                concurrent.futures.wait([answer], timeout=0.1)
                self.raise_error()
                if gives_up:
                    self._check_have_places(self._server)
            references = answer.result()
            if references is not None and not any(map(has_failed, references)):
                return [ray.get(reference) for reference in references]

    # --- What its own thread does ---

    def _new_tally(self) -> ServerTally:
        return ServerTally(self._topology.num_workers)

    def _resources(self) -> list[Mapping[str, float]]:
        topology = self._topology
        each: Mapping[str, float] = topology.worker_resources or ONE_CPU
        return [each] * topology.num_workers + [ONE_CPU] * (topology.num_server_shards + topology.num_replay_shards)

    def _keepers(self) -> list[RemoteProcess]:
        """Returns who keeps the replay."""
        return self._replay.processes if self._replay is not None else [worker.process for worker in self._actors]

    def _missing(self) -> RemoteProcess | None:
        needed = [*self._server, *(self._replay.processes if self._replay is not None else [])]
        missing = next((process for process in needed if not process.is_ready), None)
        return missing or (None if self.num_ready_actors else self._actors[0].process)

    def _vital(self) -> list[RemoteProcess]:
        return [*self._server, *self._keepers()]

    def _is_busy(self) -> bool:
        flying = any(worker.num_chunks or worker.is_learning for worker in self._actors)
        is_stepping = self._is_stepping or bool(self._waiting)
        return flying or is_stepping or (self._replay is not None and self._replay.is_busy)

    def _issue(self) -> None:
        if self._parameters is None:
            self._parameters = self._all_parameters()
        self._issue_chunks()
        self._issue_gradients()
        self._issue_snapshot()

    def _ask_server(
        self, method: str, num_returns: int, then: Callable[[list[Any]], None], dropped: Callable[[], None]
    ) -> None:
        """Asks all shards of the server, between the same two steps.

        Args:
          method: of a shard.
          num_returns: of it.
          then: called with references to what each returned second.
          dropped: called instead if one of them is lost at it.
        """
        answers: dict[int, Any] = {}
        is_dropped = False

        def answered(i: int, _: Any, reference: Any, *__: Any) -> None:
            answers[i] = reference
            if len(answers) == len(self._server):
                then([answers[i] for i in range(len(self._server))])

        def lost() -> None:
            nonlocal is_dropped
            if not is_dropped:
                is_dropped = True
                dropped()

        for i, process in enumerate(self._server):
            self._supervisor.submit(
                process, method, num_returns=num_returns, on_reply=functools.partial(answered, i), on_dropped=lost
            )

    # Parameters, and the steps that move them.

    def _all_parameters(self) -> _Parameters:
        asked = [self._supervisor.submit(process, "params", num_returns=3) for process in self._server]
        _, params, target_params = zip(*asked, strict=True)
        params, target_params = (Vector(references, None, references) for references in (params, target_params))
        return _Parameters(self.version, params, self.version, target_params)

    def _pulled_by(self, worker: _Worker) -> list[Vector]:
        """Returns what a worker must pull to have the newest parameters."""
        newest, pulled = self._newest, []
        if worker.version != newest.version:
            pulled.append(newest.params)
            if worker.target_version != newest.target_version:
                pulled.append(newest.target_params)
        worker.version, worker.target_version = newest.version, newest.target_version
        return pulled

    def _has_not_pulled(self, worker: _Worker, pulled: list[Vector]) -> None:
        """Has a worker that may have got nothing pull all anew; the server hands out again what is lost."""
        worker.version = worker.target_version = -1
        if any(map(has_failed, needs_of(pulled))):
            self._parameters = None

    @property
    def _newest(self) -> _Parameters:
        assert self._parameters is not None
        return self._parameters

    def _issue_steps(self) -> None:
        """Sends the server all steps that have come while it took others, to be taken in turn; also while all rest."""
        if not self._waiting or self._is_stepping:
            return
        steps, self._waiting = self._waiting, []
        gradients = [gradient for step in steps for gradient in step]
        moves_target = self._target_clock.tick(len(steps))
        slots = [self._vectors.slot() for _ in range(1 + moves_target)]
        self.version += len(steps)
        self.learner_steps += len(steps)
        self._tally.learner_steps += len(steps)
        self._tally.num_gradients["applied"] += len(gradients)
        self._is_stepping = True
        version, left = self.version, len(self._server)
        kept: list[Any] = [*gradients, *slots]

        def ended() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._is_stepping = False
                kept.clear()  # for nobody of the server reads or writes there any more
                self._issue_steps()

        def done(seconds: float, *_: Any) -> None:
            self._note_busy("server", seconds)
            ended()

        def lost() -> None:  # on one shard, and not on others
            if version >= self._gate.oldest_version:
                self._go_back("a gradient was lost on its way to the server")
            ended()

        rooms = self._vectors.server_rooms(slots)
        num_returns = 3 if rooms[0] is None else 1
        asked = [
            self._supervisor.submit(
                process, method, room, *inputs, num_returns=num_returns, needs=needs, on_reply=done, on_dropped=lost
            )
            for process, room, (method, inputs, needs) in zip(self._server, rooms, self._inputs(gradients), strict=True)
        ]
        if self._parameters is not None:
            params, target = handed_out(asked, rooms, slots)
            kept_target = self._parameters[2:]
            self._parameters = _Parameters(version, params, *((version, target) if moves_target else kept_target))

    def _inputs(self, gradients: list[Vector]) -> list[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
        """Returns what each shard of the server is asked for, with what, and the references among that."""
        columns = list(zip(*(gradient.pieces for gradient in gradients), strict=True))
        needs = list(zip(*(gradient.needs for gradient in gradients if gradient.needs), strict=True))
        needs = needs or [()] * len(self._server)
        if len(self._server) == 1 or self._config.agent.max_gradient_norm is None:
            return [("step", *each) for each in zip(columns, needs, strict=True)]
        squares = tuple(self._add_up(*each) for each in zip(self._server, columns, needs, strict=True))
        return [("apply", squares, squares)] * len(self._server)

    def _add_up(self, process: RemoteProcess, gradients: tuple[Any, ...], needs: tuple[Any, ...]) -> Any:
        """Has a shard add up its pieces of some gradients, and returns a reference to the sums of their squares."""

        def done(seconds: float, _: Any) -> None:
            self._note_busy("server", seconds)

        return self._supervisor.submit(process, "add_up", *gradients, num_returns=2, needs=needs, on_reply=done)[1]

    def _issue_snapshot(self) -> None:
        last = self._snapshot.learner_steps if self._snapshot else None
        is_due = last is None or self.learner_steps - last >= self._topology.snapshot_period_learner_steps
        if not is_due or self._is_asked_for_snapshot:
            return
        self._is_asked_for_snapshot = True
        version, learner_steps, target_age = self.version, self.learner_steps, self._target_clock.age

        def there(leaves: list[Any]) -> None:
            self._is_asked_for_snapshot = False
            if version >= self._gate.oldest_version:  # else the server has gone back since
                self._snapshot = _Snapshot(learner_steps, target_age, leaves)

        def lost() -> None:
            self._is_asked_for_snapshot = False

        self._ask_server("state", 2, there, lost)

    def _server_is_lost(self, i: int) -> None:
        self._go_back(f"{self._server[i].name} was lost")

    def _go_back(self, why: str) -> None:
        """Has all shards of the server go on from the newest state that is there of all of them."""
        before = self.learner_steps
        self.version += 1
        self._gate.oldest_version = self.version  # gradients of parameters that are no more are refused
        num_gradients = len(self._waiting) * self._topology.gradients_per_learner_step + len(self._gradients)
        self._tally.num_gradients["stale"] += num_gradients
        self._waiting, self._gradients, self._parameters = [], [], None
        snapshot = self._snapshot
        if snapshot is not None and not any(map(has_failed, snapshot.leaves)):
            self.learner_steps, whence = snapshot.learner_steps, "the newest snapshot"
            self._target_clock.age = snapshot.target_age
            for process, leaves in zip(self._server, snapshot.leaves, strict=True):
                self._supervisor.submit(process, "restore", leaves)
        elif newest := self._of_newest_checkpoint(self._read_learner):
            self._snapshot = None  # which is gone; the next is taken at once
            learner, counters = newest
            self.learner_steps, whence = counters["learner_steps"], "the newest checkpoint"
            self._give_server(learner)
        else:
            self._snapshot = None
            self.learner_steps, whence = 0, "the beginning: there is neither snapshot nor checkpoint"
            self._target_clock.age = 0
            for process in self._server:
                self._supervisor.submit(process, "reset")
        logger.warning(
            "%s: the server goes back from learner step %d to %d, %s", why, before, self.learner_steps, whence
        )

    def _give_server(self, learner: LearnerState) -> None:
        self._target_clock.age = int(learner.target_age)
        for process, leaves in zip(self._server, self._division.split(learner), strict=True):
            self._supervisor.submit(process, "restore", leaves)

    # Workers: what they do, and what they learn from.

    def _begin(self, i: int, incarnation: int) -> None:
        self._actors[i].version = self._actors[i].target_version = -1
        super()._begin(i, incarnation)

    def _worker_is_lost(self, i: int) -> None:
        worker, lost = self._actors[i], self._actors[i].stock.num_transitions
        self._actor_is_lost(i)
        if self._replay is not None:
            return
        worker.stock = EMPTY_SHARD
        found, whence = 0, "there is no checkpoint that has them"
        newest = self._of_newest_checkpoint(self._read_replay) if self._config.checkpoint_replay else None
        if newest:
            saved, counters = newest
            own = share_of(saved, self._topology.actor_pool, i)
            self._give_worker(i, own)
            found = int(np.sum(np.asarray(own.leaves) > 0))
            whence = f"from the checkpoint at environment step {counters['env_steps']}"
        logger.warning("%s held %d transitions; %d are back: %s", worker.process.name, lost, found, whence)

    def _give_worker(self, i: int, own: SavedReplay) -> None:
        def has(stock: ShardStats) -> None:
            self._actors[i].stock = stock

        self._supervisor.submit(self._actors[i].process, "restore", own, on_reply=has)

    def _ask_for_chunk(self, i: int, writer: Writer) -> None:
        worker = self._actors[i]
        pulled = self._pulled_by(worker)
        handed, needs = to_pull(pulled), needs_of(pulled)

        def gone() -> None:
            worker.num_chunks -= 1

        def arrived(answer: tuple[Report, ShardStats | None], reference: Any) -> None:
            report, stock = answer
            count = functools.partial(self._count, i, report)
            if self._replay is not None:
                self._replay.store(i, writer, reference, count, gone)
                return
            assert stock is not None
            worker.stock = stock
            count()
            gone()

        def lost() -> None:
            gone()
            self._has_not_pulled(worker, pulled)

        exploration = float(exploration_at(self._config.agent, np.array(self.env_steps)))
        self._supervisor.submit(
            worker.process, "pull_and_act", worker.version, exploration, *handed, num_returns=2, needs=needs,
            on_reply=arrived, on_dropped=lost,
        )  # fmt: skip

    def _count(self, i: int, report: Report) -> None:
        super()._count(i, report)
        self._note_busy("workers", report.busy_seconds)

    def _issue_gradients(self) -> None:
        topology = self._topology
        if self._waiting:  # then there are newer parameters soon
            return
        each = topology.gradients_per_learner_step
        due = (self.rate_limiter.due(self.env_steps) - self.learner_steps) * each
        # With so many under way, none that is asked for now is stale unless others overtake it.
        most = min(due, (topology.max_staleness + 1) * each)
        num_coming = len(self._gradients) + sum(worker.is_learning for worker in self._actors)
        for worker in map(self._actors.__getitem__, self._in_turn()):
            if num_coming >= most:
                return
            # One at a time: parameters that waited for the one before would be older by a step of every other worker.
            if not worker.is_learning and worker.process.is_ready and self._is_warm(worker):
                if not self._ask_for_gradient(worker):
                    return
                num_coming += 1

    def _is_warm(self, worker: _Worker) -> bool:
        """Returns whether a worker's own replay has its share of the warm-up, or half of what it can hold."""
        agent, num_workers = self._config.agent, self._topology.num_workers
        share = min(agent.warmup_env_steps, agent.replay_capacity // 2) // num_workers
        return self._replay is not None or worker.stock.num_transitions >= max(1, share - agent.n_step)

    def _ask_for_gradient(self, worker: _Worker) -> bool:
        """Asks for one; returns whether there is anything to learn from."""
        agent = self._config.agent
        exponent = float(importance_exponent_at(agent, np.array(self.env_steps)))
        exponent = exponent if agent.replay == "prioritised" else 0.0
        drawn = None
        if self._replay is not None:
            drawn = self._replay.draw(agent.batch_size, exponent)
            if drawn is None:
                return False
        worker.is_learning = True
        self._note_request(worker)
        pulled, version, slot = self._pulled_by(worker), worker.version, self._vectors.slot()
        handed, needs, room = to_pull(pulled), needs_of(pulled), self._vectors.gradient_room(slot)
        num_pieces = 0 if room else len(self._server)

        def lost() -> None:
            worker.is_learning = False
            self._has_not_pulled(worker, pulled)

        def arrived(lesson: Lesson, *references: Any) -> None:
            pieces, errors = references[:num_pieces], references[num_pieces:]
            gradient = Vector(tuple(room) if room else pieces, slot, pieces)
            self._gradient_has_come(worker, version, lesson, gradient)
            if drawn is not None and self._replay is not None:
                self._replay.return_errors(drawn, errors)

        if drawn is None:
            self._supervisor.submit(
                worker.process, "pull_and_learn", version, exponent, room, *handed, num_returns=1 + num_pieces,
                needs=needs, on_reply=arrived, on_dropped=lost,
            )  # fmt: skip
        else:
            num_handed, *handed_on = handed
            shares = tuple(drawn.references)
            self._supervisor.submit(
                worker.process, "pull_and_learn_of", version, drawn.places, room, num_handed, *shares, *handed_on,
                num_returns=1 + num_pieces + len(shares), needs=(*shares, *needs), on_reply=arrived, on_dropped=lost,
            )  # fmt: skip
        return True

    def _gradient_has_come(self, worker: _Worker, version: int, lesson: Lesson, gradient: Vector) -> None:
        worker.is_learning = False
        tally, newest_version = self._tally, self.version + len(self._waiting)
        self._note_busy("workers", lesson.busy_seconds)
        verdict = self._gate.verdict(version, newest_version, lesson.loss)
        tally.pushed_bytes += self._division.num_params * (2 if self._topology.gradient_dtype == "bfloat16" else 4)
        if verdict != "applied":
            tally.num_gradients[verdict] += 1
            return
        tally.staleness.append(newest_version - version)
        tally.losses.append(lesson.loss)
        tally.td_errors.append(lesson.td_error)
        self._gradients.append(gradient)
        if len(self._gradients) == self._topology.gradients_per_learner_step:
            self._waiting.append(self._gradients)
            self._gradients = []
            self._issue_steps()

    # The beginning.

    def _start_processes(self) -> None:
        topology, make, add, config = self._topology, self._make_process, self._supervisor.add, self._config
        resources = dict(topology.worker_resources) or ONE_CPU
        environment = {} if resources.get("GPU") else IN_LINE
        memory = self._vectors.share(self._stack)
        for i in range(topology.num_server_shards):
            name, lost = f"server shard {i}", functools.partial(self._server_is_lost, i)
            self._server.append(add(make(name, RemoteServerShard, (config, i, memory), ONE_CPU, IN_LINE, lost)))
        if self._replay is not None:
            for i in range(topology.num_replay_shards):
                name, lost = f"replay shard {i}", functools.partial(self._shard_is_lost, i)
                self._replay.add(add(make(name, RemoteReplayShard, (config, i), ONE_CPU, IN_LINE, lost)))
        for i in range(topology.num_workers):
            name, lost = f"worker {i}", functools.partial(self._worker_is_lost, i)
            worker = make(name, RemoteWorker, (config, i, memory), resources, environment, lost)
            self._actors.append(_Worker(add(worker)))
            self._begin(i, 0)

    def _restore_processes(self, state: dict[str, Any], incarnation: int, version: int) -> None:
        self.version = self._gate.oldest_version = version + 1
        self._give_server(state["learner"])
        for i in range(len(self._actors)):
            self._begin(i, incarnation)
        if "replay" not in state:
            return
        if self._replay is not None:
            for i in range(len(self._replay.processes)):
                self._replay.give(i, state["replay"])
        else:
            for i in range(len(self._actors)):
                self._give_worker(i, share_of(state["replay"], self._topology.actor_pool, i))
