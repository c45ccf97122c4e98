"""Who directs the parts of a fleet: a thread that asks them for chunks, batches and learner steps, and hears of them.

What is asked for is bounded, and what comes back is passed on by reference. See `qfleet.topologies.actor_learner`.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.config import ActorLearnerConfig, ConfigError, TrainConfig
from qfleet.core.exploration import importance_exponent_at
from qfleet.core.learner import LearnerState
from qfleet.core.replay import Part as Draws
from qfleet.core.replay import SavedReplay
from qfleet.runtime.checkpoints import Checkpoints
from qfleet.topologies.actor_learner_flow import CHUNKS_AHEAD, ROUNDS_AHEAD, Limiter, Tally, deal
from qfleet.topologies.actor_learner_parts import (
    ONE_CPU,
    Part,
    Parts,
    RemoteActor,
    RemoteLearner,
    RemoteShard,
    cpus_for,
    default_resources,
    has_failed,
)
from qfleet.topologies.actor_learner_shard import NOTHING, Stock, Writer, share_of
from qfleet.topologies.ray_cluster import connected, in_words, room
from qfleet.topologies.topology import StateIsLost

logger = logging.getLogger("qfleet")

_WAIT_SECONDS = 0.1
"""For an answer, before anything else is looked at."""

_LOST_SECONDS = 30.0
"""After which a part that has no place isn't waited for any more, where something else can be done."""

_PATIENCE = 5
"""Times `silence_seconds` that the parts may take to find their places at the start."""


class _Broadcast(NamedTuple):
    """Parameters that actors can take."""

    version: int
    """Counts up, whatever happens to the learner."""
    learner_steps: int
    """Of which they are."""
    box: list[Any]
    """A reference to them; none if they are lost."""


class _Chunk(NamedTuple):
    """A chunk on its way to its shard."""

    actor: int
    writer: Writer
    reference: Any
    report: Any
    staleness: int


@dataclasses.dataclass
class _Actor:
    """What this process knows of an actor."""

    part: Part
    num_flying: int = 0
    """Chunks that it was asked for, and that are not in the replay yet."""
    num_asked: int = 0
    """Of the incarnation that has the place."""
    asked_last: int = 0
    """When, counted in requests to all actors."""


@dataclasses.dataclass
class _Shard:
    """What this process knows of a shard of the replay."""

    part: Part
    stock: Stock = NOTHING


class Director:
    """Directs the parts of one run. Public methods are for other threads than its own."""

    def __init__(
        self,
        config: TrainConfig,
        num_batches: int,
        read_learner: Callable[[Checkpoints, int], LearnerState],
        read_replay: Callable[[Checkpoints, int], SavedReplay],
    ) -> None:
        """Starts nothing yet.

        Args:
          config: of the run.
          num_batches: of one round.
          read_learner: reads the learner of a checkpoint.
          read_replay: reads its replay, as one for all shards.
        """
        assert isinstance(config.topology, ActorLearnerConfig)
        self._config, self._topology, self._num_batches = config, config.topology, num_batches
        self._read_learner, self._read_replay = read_learner, read_replay
        self.checkpoints_path: Path | None = None
        """Where parts that are replaced find what they were; without it they begin anew."""
        self.env_steps = 0
        """Of which the replay has had the rows."""
        self.learner_steps = 0
        """Taken so far, by the learner that there is."""
        self.limiter = Limiter(config, num_batches)
        self.incarnations = [0] * self._topology.num_actors
        """Of each actor, how many had its place before."""
        self._broadcast: _Broadcast | None = None
        self._is_broadcast_asked = False
        self._actors: list[_Actor] = []
        self._shards: list[_Shard] = []
        self._rounds: set[int] = set()  # under way
        self._num_rounds = 0
        self._num_returning = 0  # sets of errors on their way to shards
        self._num_inserting = 0  # chunks on their way to shards
        self._num_requests = 0  # for chunks, to all actors
        self._arrived: list[_Chunk] = []  # while nothing may be stored
        self._random = np.random.default_rng((config.seed, 3))
        self._tally = Tally(self._topology.num_actors)
        self._requests: collections.deque[Callable[[], None]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Condition()
        self._is_paused = self._is_new = True
        self._must_end = False
        self._error: BaseException | None = None
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Starts all parts, and returns when the learner, the replay and an actor are there; nothing is learned yet.

        Raises:
          ConfigError: if the cluster isn't there, or has no room for them.
        """
        topology = self._topology
        num_cpus = cpus_for(
            [topology.actor_resources or ONE_CPU] * (topology.num_actors + topology.num_replay_shards)
            + [topology.learner_resources or ONE_CPU]
        )
        inherits = self._stack.enter_context(connected(topology.ray_address, num_cpus, "ray_address"))
        self._make_part = functools.partial(Part, inherits=inherits)
        self._parts = Parts(topology.silence_seconds, topology.max_restarts)
        self._stack.callback(self._parts.end)
        self._make_parts()
        self._thread = threading.Thread(target=self._direct, name="qfleet-director", daemon=True)
        self._thread.start()
        needed = [self._learner, *(shard.part for shard in self._shards)]
        patience = _PATIENCE * topology.silence_seconds
        deadline = time.monotonic() + patience
        with self._lock:
            while not (all(part.is_there for part in needed) and self.num_actors_there):
                self.raise_error()
                if time.monotonic() > deadline:
                    missing = next(part for part in [*needed, self._actors[0].part] if not part.is_there)
                    raise ConfigError(
                        f"a Ray cluster must have room for the learner, all shards of the replay and an actor, got "
                        f"none for {missing.name} with {in_words(missing.resources)} in {patience:g} s, "
                        f"{room(missing.resources)}; add nodes, or give smaller --actor-resources or "
                        f"--learner-resources"
                    )
                self._lock.wait(_WAIT_SECONDS)

    def close(self) -> None:
        """Ends all parts, and the connection to Ray; may be called twice, and before `start`."""
        if self._thread is not None:
            with self._lock:
                self._must_end = True
            self._thread.join()
            self._thread = None
        self._stack.close()

    def go_on(self, until_env_steps: int, seconds: float) -> Tally:
        """Lets the fleet train until it has taken so many environment steps, or for so long; it doesn't stop then.

        Returns:
          What happened since the last call.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            if self._is_new:
                self._tally = Tally(self._topology.num_actors)
            self._is_paused = self._is_new = False
            while self._error is None and self.env_steps < until_env_steps and time.monotonic() < deadline:
                self._lock.wait(_WAIT_SECONDS)
            self.raise_error()
            tally, self._tally = self._tally, Tally(self._topology.num_actors)
            tally.seconds = self._tally.started_at - tally.started_at
            tally.end = (self.env_steps, self.learner_steps)
            return tally

    def rest(self) -> None:
        """Returns once nothing is under way to the learner or a shard; until `go_on`, actors act, nothing is stored.

        Raises:
          StateIsLost: if one of these has no place.
        """
        with self._lock:
            self._is_paused = True
            while self._rounds or self._num_returning or self._num_inserting:
                self.raise_error()
                self._check_has_place(self._learner, *(shard.part for shard in self._shards))
                self._lock.wait(_WAIT_SECONDS)

    def restore(self, state: dict[str, Any], counters: dict[str, Any]) -> None:
        """Has all parts go on from a checkpoint, before the first `go_on`; without a replay, from an empty one."""
        self.env_steps, self.learner_steps = counters["env_steps"], counters["learner_steps"]
        starts_at = counters["replay_starts_at"] if "replay" in state else self.env_steps
        self.limiter.go_on(starts_at, self.env_steps, self.learner_steps)
        # Of a fleet that was larger or smaller, or of none: beyond all actors that there have been.
        incarnation = max(counters.get("incarnations", []), default=-1) + 1
        self._post(lambda: self._restore_parts(state, incarnation, counters.get("version", 0)))

    @property
    def version(self) -> int:
        """Of the newest parameters that actors can take: counts up, whatever happens to the learner."""
        return self._broadcast.version if self._broadcast else 0

    @property
    def num_actors_there(self) -> int:
        """Actors that have a place."""
        return sum(actor.part.is_there for actor in self._actors)

    @property
    def num_transitions(self) -> int:
        """That the replay holds."""
        return sum(shard.stock.num_transitions for shard in self._shards)

    @property
    def num_restarts(self) -> int:
        """Parts that were replaced."""
        return self._parts.num_restarts

    def params(self) -> tuple[int, list[np.ndarray]]:
        """Returns what `GlobalLearner.params` does, as soon as there is a learner."""
        return self._answer_of(self._learner, "params")

    def learner_state(self) -> tuple[int, list[np.ndarray]]:
        """Returns what `GlobalLearner.state` does.

        Raises:
          StateIsLost: if there is no learner, nor a place for one.
        """
        return self._answer_of(self._learner, "state", gives_up=True)

    def snapshots(self) -> Iterator[SavedReplay]:
        """Yields what each shard of the replay keeps, of which one at a time is held here.

        Raises:
          StateIsLost: if one has no place.
        """
        for shard in self._shards:
            yield self._answer_of(shard.part, "snapshot", gives_up=True)

    # --- What its own thread does ---

    def _direct(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._must_end:
                        return
                    while self._requests:
                        self._requests.popleft()()
                    self._issue()
                self._parts.wait(_WAIT_SECONDS)
                with self._lock:
                    self._parts.hear()
                    self._lock.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = error
                self._lock.notify_all()

    def _post(self, function: Callable[[], None]) -> None:
        """Has the thread call a function."""
        with self._lock:
            self._requests.append(function)

    def _answer_of(self, part: Part, method: str, *, gives_up: bool = False) -> Any:
        """Returns what a part answers, or the one that replaces it meanwhile; for other threads."""
        answer: concurrent.futures.Future = concurrent.futures.Future()

        def ask() -> None:
            self._parts.ask(part, method, then=answer.set_result, is_repeated=True)

        self._post(ask)
        while True:
            try:
                return answer.result(_WAIT_SECONDS)
            except TimeoutError:
                self.raise_error()
                if gives_up:
                    self._check_has_place(part)

    def _check_has_place(self, *parts: Part) -> None:
        for part in parts:
            if not part.is_there and time.monotonic() - part.started_at > _LOST_SECONDS:
                raise StateIsLost(f"{part.name} is lost, and has no place with {in_words(part.resources)} yet")

    def raise_error(self) -> None:
        """Raises in this thread what has ended the other."""
        if self._error is not None:
            raise self._error

    def _issue(self) -> None:
        """Asks for all that may be under way now."""
        if self._is_paused:
            return
        arrived, self._arrived = self._arrived, []
        for chunk in arrived:
            self._store(chunk)
        self._issue_broadcast()
        self._issue_rounds()
        self._issue_chunks()

    # Actors and their chunks.

    def _begin(self, i: int, incarnation: int) -> None:
        """Has an actor begin, as the one of so many before it that its place has had."""
        self.incarnations[i] = incarnation
        self._actors[i].num_asked = 0
        self._parts.ask(self._actors[i].part, "begin", incarnation)

    def _actor_is_lost(self, i: int) -> None:
        self._begin(i, self.incarnations[i] + 1)

    def _issue_chunks(self) -> None:
        broadcast, steps = self._broadcast, self._env_steps_per_chunk
        if broadcast is None or not broadcast.box:
            return
        num_flying = sum(actor.num_flying for actor in self._actors)
        for _ in range(CHUNKS_AHEAD):
            for i in sorted(range(len(self._actors)), key=lambda i: self._actors[i].asked_last):
                coming = self.env_steps + num_flying * steps
                if coming >= self._config.env_steps or self.limiter.is_far_ahead(coming, self.learner_steps):
                    return
                if self._actors[i].num_flying < CHUNKS_AHEAD and self._actors[i].part.is_there:
                    self._ask_for_chunk(i, broadcast)
                    num_flying += 1

    def _ask_for_chunk(self, i: int, broadcast: _Broadcast) -> None:
        actor, writer = self._actors[i], Writer(self.incarnations[i], self._actors[i].num_asked)
        actor.num_asked += 1
        actor.num_flying += 1
        self._num_requests += 1
        actor.asked_last = self._num_requests

        def arrived(report: Any, reference: Any) -> None:
            staleness = max(0, self.learner_steps - broadcast.learner_steps)
            chunk = _Chunk(i, writer, reference, report, staleness)
            if self._is_paused:
                self._arrived.append(chunk)
            else:
                self._store(chunk)

        def lost() -> None:
            actor.num_flying -= 1
            if any(map(has_failed, broadcast.box)):  # the node that kept the parameters has left
                broadcast.box.clear()

        self._parts.ask(
            actor.part, "fetch_and_collect", broadcast.version, broadcast.box, then=arrived, num_returns=2,
            dropped=lost, needs=tuple(broadcast.box),
        )  # fmt: skip

    def _store(self, chunk: _Chunk) -> None:
        """Has its shard store a chunk: also the one that replaces it, if this one is lost at it."""
        actor, shard = self._actors[chunk.actor], self._shards[chunk.actor % len(self._shards)]
        self._num_inserting += 1

        def gone() -> None:  # stored, or lost with the node that kept it
            self._num_inserting -= 1
            actor.num_flying -= 1

        def stored(answer: tuple[Stock, bool]) -> None:
            gone()
            self._note_stock(shard, answer[0])
            if answer[1]:
                self._count(chunk)

        segment = chunk.actor // len(self._shards)
        self._parts.ask(
            shard.part, "insert", segment, chunk.writer, chunk.reference, then=stored, needs=(chunk.reference,),
            dropped=gone, is_repeated=True,
        )  # fmt: skip

    def _count(self, chunk: _Chunk) -> None:
        """Counts a chunk that the replay has."""
        tally, report, steps = self._tally, chunk.report, self._env_steps_per_chunk
        self.env_steps += steps
        tally.env_steps += steps
        tally.actor_env_steps[chunk.actor] += steps
        tally.returns += report.returns
        tally.lengths += report.lengths
        tally.q_mean.append(report.q_mean)
        tally.num_failures += report.num_failures
        tally.received_bytes += report.received_bytes
        tally.staleness.append(chunk.staleness)
        tally.busy_seconds["actors"] += report.busy_seconds

    @property
    def _env_steps_per_chunk(self) -> int:
        return self._topology.rows_per_chunk * self._topology.lanes_per_actor

    # Shards of the replay.

    def _note_stock(self, shard: _Shard, stock: Stock) -> None:
        shard.stock = stock
        self._tally.busy_seconds["shards"] += stock.busy_seconds

    def _shard_is_lost(self, i: int) -> None:
        shard, lost = self._shards[i], self._shards[i].stock.num_transitions
        shard.stock = NOTHING
        found, whence = 0, "there is no checkpoint that has them"
        if self._config.checkpoint_replay and (newest := self._of_newest_checkpoint(self._read_replay)):
            saved, counters = newest
            self._give_shard(i, saved)
            found = int(np.sum(np.asarray(share_of(saved, self._topology, i).leaves) > 0))
            whence = f"from the checkpoint at environment step {counters['env_steps']}"
        if not found and not self.num_transitions:  # then few are learned from over and over, but for a new warm-up
            self.limiter.begin_anew(self.env_steps, self.learner_steps)
        logger.warning("%s held %d transitions; %d are back: %s", shard.part.name, lost, found, whence)

    def _give_shard(self, i: int, saved: SavedReplay) -> None:
        """Has a shard go on from its lanes of a saved replay."""
        shard, own = self._shards[i], share_of(saved, self._topology, i)
        self._parts.ask(shard.part, "restore", own, then=functools.partial(self._note_stock, shard))

    # The learner and its rounds.

    def _issue_rounds(self) -> None:
        agent, size = self._config.agent, self._num_batches * self._config.agent.batch_size
        due = self.limiter.due(self.env_steps)
        while (
            len(self._rounds) < ROUNDS_AHEAD
            and self._learner.is_there
            and self.learner_steps + self._num_batches * (len(self._rounds) + 1) <= due
        ):
            priorities = np.array([shard.stock.priority for shard in self._shards])
            num_transitions = sum(shard.stock.num_transitions for shard in self._shards)
            if not num_transitions:
                return
            counts, shares = deal(size, priorities, self._random)
            exponent = float(importance_exponent_at(agent, np.array(self.env_steps)))
            self._ask_for_round(counts, shares, num_transitions, exponent if agent.replay == "prioritised" else 0.0)

    def _ask_for_round(self, counts: np.ndarray, shares: np.ndarray, num_transitions: int, exponent: float) -> None:
        number = self._num_rounds
        self._num_rounds += 1
        self._rounds.add(number)
        size = int(counts.sum())
        order = self._random.permutation(size).astype(np.uint32)
        places, parts, shards = np.split(order, np.cumsum(counts)[:-1]), [], []
        for shard, count, share in zip(self._shards, counts, shares, strict=True):
            if count:
                draws = Draws(np.int32(count), np.float32(share), np.float32(num_transitions))  # type: ignore[arg-type]
                seed = int(self._random.integers(2**32))
                asked = self._parts.ask(
                    shard.part, "sample", number, seed, exponent, draws, size, num_returns=2,
                    then=lambda stock, _, shard=shard: self._note_stock(shard, stock),
                )  # fmt: skip
                parts.append(asked[1])
                shards.append(shard)
        self._parts.ask(
            self._learner, "learn", [place for place in places if len(place)], *parts, num_returns=1 + len(parts),
            needs=tuple(parts), then=functools.partial(self._learned, number, shards),
            dropped=functools.partial(self._rounds.discard, number),
        )  # fmt: skip

    def _learned(self, number: int, shards: list[_Shard], lesson: Any, *errors: Any) -> None:
        tally = self._tally
        self._rounds.discard(number)
        self.learner_steps = lesson.learner_steps
        tally.learner_steps += self._num_batches
        tally.loss += lesson.losses.loss
        tally.td_error += lesson.losses.td_error
        tally.busy_seconds["learner"] += lesson.busy_seconds
        for shard, reference in zip(shards, errors, strict=True):
            self._return_errors(number, shard, reference)

    def _return_errors(self, number: int, shard: _Shard, reference: Any) -> None:
        self._num_returning += 1

        def gone() -> None:  # set, or lost with the shard or the node that kept them
            self._num_returning -= 1

        def returned(stock: Stock) -> None:
            gone()
            self._note_stock(shard, stock)

        self._parts.ask(
            shard.part, "set_priorities", number, reference, then=returned, needs=(reference,), dropped=gone
        )

    def _issue_broadcast(self) -> None:
        newest = self._broadcast
        period = self._topology.broadcast_period_learner_steps
        is_due = newest is None or not newest.box or self.learner_steps >= newest.learner_steps + period
        if not is_due or self._is_broadcast_asked or not self._learner.is_there:
            return
        self._is_broadcast_asked = True

        def there(learner_steps: int, reference: Any) -> None:
            self._is_broadcast_asked = False
            version = self._broadcast.version + 1 if self._broadcast else 1
            self._broadcast = _Broadcast(version, learner_steps, [reference])

        self._parts.ask(self._learner, "params", num_returns=2, then=there)

    def _learner_is_lost(self) -> None:
        self._is_broadcast_asked = False
        before, self.learner_steps = self.learner_steps, 0
        whence = "from the beginning: there is no checkpoint yet"
        if newest := self._of_newest_checkpoint(self._read_learner):
            learner, counters = newest
            self.learner_steps = counters["learner_steps"]
            self._give_learner(learner)
            whence = f"from the newest checkpoint, at learner step {self.learner_steps}"
        if self._broadcast is not None:  # else the next would seem to be far off
            self._broadcast = self._broadcast._replace(learner_steps=self.learner_steps)
        logger.warning("the learner had taken %d steps, and goes on %s", before, whence)

    def _give_learner(self, state: LearnerState) -> None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        self._parts.ask(self._learner, "restore", self.learner_steps, leaves)

    def _of_newest_checkpoint(self, read: Callable[[Checkpoints, int], Any]) -> tuple[Any, dict[str, Any]] | None:
        """Returns what is read of the newest checkpoint, and its counters; None if there is none yet."""
        if self.checkpoints_path is None:
            return None
        checkpoints = Checkpoints(self.checkpoints_path, is_keeper=False)
        while (newest := checkpoints.latest()) is not None:
            try:
                return read(checkpoints, newest), checkpoints.read_metadata(newest)["counters"]
            except Exception:
                if newest in checkpoints.all():
                    raise
                # Else it was deleted meanwhile, for there is a newer one.
        return None

    def _make_parts(self) -> None:
        topology, config, add = self._topology, self._config, self._parts.add
        on_cpu = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}
        resources = dict(topology.learner_resources) or default_resources(topology.mesh.num_devices)
        actor_resources = dict(topology.actor_resources) or ONE_CPU
        learner_environment = {} if resources.get("GPU") else {"JAX_PLATFORMS": "cpu"}
        self._learner = add(
            self._make_part(
                "learner",
                RemoteLearner,
                (config,),
                resources,
                learner_environment,
                self._learner_is_lost,
            )
        )
        for i in range(topology.num_replay_shards):
            name, lost = f"replay shard {i}", functools.partial(self._shard_is_lost, i)
            kind, arguments = RemoteShard, (config, i)
            part = self._make_part(name, kind, arguments, actor_resources, on_cpu, lost)
            self._shards.append(_Shard(add(part)))
        for i in range(topology.num_actors):
            name, lost = f"actor {i}", functools.partial(self._actor_is_lost, i)
            part = self._make_part(name, RemoteActor, (config, i), actor_resources, on_cpu, lost)
            self._actors.append(_Actor(add(part)))
            self._begin(i, 0)

    def _restore_parts(self, state: dict[str, Any], incarnation: int, version: int) -> None:
        self._broadcast = _Broadcast(version, self.learner_steps, [])  # which nobody takes: it has no parameters
        self._give_learner(state["learner"])
        if "replay" in state:
            for i in range(len(self._shards)):
                self._give_shard(i, state["replay"])
        for i in range(len(self._actors)):
            self._begin(i, incarnation)
