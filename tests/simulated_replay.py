"""Models of actors, of the shards of a replay, and of the learner; and the rig of actor-learner.

A chunk is a record that says who has made it. A saved replay has one row for each chunk, whose observation
is its number.
"""

from typing import Any, NamedTuple

import numpy as np
from fleet_simulator import Host, World
from invariants import require
from simulated_rig import Rig

from qfleet.config import TrainConfig
from qfleet.core.replay import CONTINUED, NO_STEP, SavedReplay
from qfleet.core.replay.ring import Ring, Row
from qfleet.topologies.actor_learner.director import ActorLearnerDirector
from qfleet.topologies.actor_learner.learner import UpdateResult
from qfleet.topologies.actor_learner.remote import RemoteActor, RemoteLearner
from qfleet.topologies.fleet.actor import ChunkStats
from qfleet.topologies.fleet.rate_limiter import CHUNKS_AHEAD, ROUNDS_AHEAD
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote import RemoteReplayShard
from qfleet.topologies.fleet.replay_shard import InsertReply, SampleReply, ShardStats, Writer, admit
from qfleet.topologies.fleet.replay_shares import join_shards

NUM_SAVED_ROWS = 512
"""Rows of a saved replay."""


class ChunkId(NamedTuple):
    """A chunk, by what it is."""

    actor: int
    incarnation: int
    number: int
    """Number of chunks that this incarnation has made before."""

    def encoded(self) -> int:
        return (self.actor * 10_000 + self.incarnation) * 10_000 + self.number

    @classmethod
    def decoded(cls, code: int) -> "ChunkId":
        return cls(code // 10**8, code // 10_000 % 10_000, code % 10_000)


def saved_replay(lanes: list[list[int]]) -> SavedReplay:
    """Returns a replay that holds these numbers, each as a row of its lane, which is a segment."""
    obs = np.zeros((NUM_SAVED_ROWS, len(lanes)), np.int64)
    outcome = np.full(obs.shape, NO_STEP, np.uint8)
    for i, lane in enumerate(lanes):
        newest = lane[-NUM_SAVED_ROWS:]
        obs[: len(newest), i], outcome[: len(newest), i] = newest, CONTINUED
    sizes = np.array([min(len(lane), NUM_SAVED_ROWS) for lane in lanes], np.int32)
    ring: Any = Ring(Row(obs, outcome, outcome, outcome), sizes % NUM_SAVED_ROWS, sizes, sizes)
    return SavedReplay(ring, (outcome != NO_STEP).astype(np.float32), np.float32(1.0))  # type: ignore[arg-type]


def lanes_of(saved: SavedReplay) -> list[list[int]]:
    """Returns the numbers that `saved_replay` has put into a replay."""
    return [saved.ring.rows.obs[: saved.ring.size[i], i].tolist() for i in range(len(saved.ring.size))]


class Ledger:
    """What has happened in truth, since a director started."""

    def __init__(self, num_batches: int = 1) -> None:
        self.num_batches = num_batches
        self.made: dict[ChunkId, Host] = {}
        """All chunks, and who has made them."""
        self.references: dict[ChunkId, Reference] = {}
        self.stored: set[ChunkId] = set()
        """Chunks that a shard has stored at any time."""
        self.params: dict[int, Any] = {}
        """Parameters of each version."""

    def note_params(self, version: int, params: Any) -> None:
        """Notes which parameters an actor has received."""
        known = self.params.setdefault(version, params)
        require("a version stands for one set of parameters", known == params, version, known, params)


class ActingModel:
    """What actors and workers have in common: they make chunks."""

    def __init__(self, ledger: Ledger, host: Host, config: TrainConfig, number: int) -> None:
        self.ledger, self.host, self.config, self.number = ledger, host, config, number
        self.incarnation, self.num_chunks, self.version = -1, 0, -1

    def begin(self, incarnation: int) -> None:
        require("an incarnation begins before it acts", self.num_chunks == 0)
        self.incarnation = incarnation

    def make_chunk(self) -> tuple[ChunkStats, ChunkId]:
        require("an actor has begun before it acts, and has parameters", self.incarnation >= 0 and self.version >= 0)
        chunk = ChunkId(self.number, self.incarnation, self.num_chunks)
        self.num_chunks += 1
        require("no chunk is made twice", chunk not in self.ledger.made, chunk)
        self.ledger.made[chunk] = self.host
        return ChunkStats([], [], 0.0, 0, 0.5, 0), chunk

    def take_version(self, version: int) -> None:
        require("versions never go back", version >= self.version, self.host.name, version, self.version)
        self.version = version


class ActorModel(ActingModel):
    def collect(self, version: int, params: Reference, exploration: float) -> tuple[ChunkStats, Reference]:
        if version != self.version:
            self.ledger.note_params(version, params.value)
            self.take_version(version)
        stats, chunk = self.make_chunk()
        self.ledger.references[chunk] = Reference(chunk)
        return stats, self.ledger.references[chunk]


class Segment:
    """The chunks of one actor, as a replay keeps them."""

    def __init__(self, actor: int) -> None:
        self.actor, self.chunks, self._writer = actor, list[ChunkId](), Writer()
        self._last: ChunkId | None = None

    def insert(self, writer: Writer, chunk: ChunkId) -> bool:
        admission = admit(self._writer, writer)
        require("rows come to their own segment", chunk.actor == self.actor, chunk, self.actor)
        if admission is None:
            return False
        last, self._writer, self._last = self._last, admission.writer, chunk
        require("every row is stored once", chunk not in self.chunks, chunk)
        is_newer = last is None or chunk > last
        require("no row of an old incarnation follows one of a newer", is_newer, chunk, last)
        follows = last is not None and chunk == last._replace(number=last.number + 1)
        require("rows that don't follow each other are cut", admission.is_cut or follows, chunk, last)
        self.chunks.append(chunk)
        return True

    def restore(self, codes: list[int]) -> None:
        self.chunks, self._writer, self._last = [ChunkId.decoded(code) for code in codes], Writer(), None
        require("every row is stored once", len(set(self.chunks)) == len(self.chunks))


class Share(NamedTuple):
    """A shard's share of a draw, and also its priorities."""

    shard: int
    number: int
    num_draws: int


class ShardModel:
    def __init__(self, ledger: Ledger, host: Host, config: TrainConfig, number: int) -> None:
        self.ledger, self.number, pool = ledger, number, config.topology.actor_pool
        self.segments = [Segment(actor) for actor in pool.actors_of(number)]
        self._steps = pool.rows_per_chunk * pool.lanes_per_actor
        self._draws: set[int] = set()

    @property
    def stats(self) -> ShardStats:
        num_transitions = self._steps * sum(len(segment.chunks) for segment in self.segments)
        return ShardStats(float(num_transitions), num_transitions, 0.1)

    def insert(self, segment: int, writer: Writer, chunk: Reference) -> InsertReply:
        is_stored = self.segments[segment].insert(writer, chunk.value)
        if is_stored:
            self.ledger.stored.add(chunk.value)
        return InsertReply(self.stats, is_stored)

    def sample_share(self, number: int, seed: int, importance_exponent: float, share: Any, most: int) -> SampleReply:
        self._draws.add(number)
        return SampleReply(self.stats, Reference(Share(self.number, number, int(share.num_draws))))

    def set_priorities(self, number: int, priority: Reference) -> ShardStats:
        require("priorities come to the shard that drew", priority.value[:2] == (self.number, number), priority.value)
        return self.stats

    def snapshot(self) -> Reference:
        return Reference(saved_replay([[chunk.encoded() for chunk in segment.chunks] for segment in self.segments]))

    def restore(self, saved: Reference) -> ShardStats:
        for segment, codes in zip(self.segments, lanes_of(saved.value), strict=True):
            segment.restore(codes)
        return self.stats


class LearnerModel:
    def __init__(self, ledger: Ledger, host: Host, config: TrainConfig) -> None:
        self.ledger, self.host, self.size = ledger, host, ledger.num_batches * config.agent.batch_size
        self.steps = 0

    def learn(self, places: list[np.ndarray], shares: list[Reference]) -> tuple[UpdateResult, list[Reference]]:
        drawn = [share.value for share in shares]
        require("a round is of one draw", len({share.number for share in drawn}) == 1, drawn)
        require("each share fills its places", [share.num_draws for share in drawn] == list(map(len, places)))
        require("a round is whole", sorted(np.concatenate(places).tolist()) == list(range(self.size)))
        self.steps += self.ledger.num_batches
        return UpdateResult(0.0, 0.0, self.steps, 0.5), [Reference(share) for share in drawn]

    def publish(self) -> tuple[int, Reference]:
        return self.steps, Reference((self.steps, self.host.number))

    def params(self) -> Reference:
        return Reference((self.steps, [np.array(self.steps)]))

    def state(self) -> Reference:
        return Reference((self.steps, [np.array(self.steps)]))

    def restore(self, learner_steps: int, leaves: Reference) -> None:
        require("counts and state belong together", learner_steps == leaves.value[0], learner_steps, leaves.value)
        self.steps = learner_steps


MODELS = {RemoteActor: ActorModel, RemoteReplayShard: ShardModel, RemoteLearner: LearnerModel}


class ReplayRig(Rig):
    """What a rig knows of actors and of a replay in shards."""

    ledger: Ledger

    @property
    def env_steps_per_chunk(self) -> int:
        pool = self.config.topology.actor_pool
        return pool.rows_per_chunk * pool.lanes_per_actor

    def begin_counting(self) -> None:
        """Remembers where a director starts."""
        self.ledger = Ledger()
        counters = self.checkpoint[1] if self.checkpoint else {}
        self._began = counters.get("env_steps", 0), counters.get("learner_steps", 0)

    def due(self, env_steps: int, starts_at: int, learner_steps_then: int) -> float:
        """Returns how many learner steps the replay ratio allows. The agent of the test has no memory."""
        agent, pool = self.config.agent, self.config.topology.actor_pool
        warmup = max(agent.warmup_env_steps, pool.num_lanes * (agent.rows_after_start + 1))
        return learner_steps_then + max(0, env_steps - starts_at - warmup) / agent.env_steps_per_learner_step

    def check_ratio(self, num_steps_under_way: int) -> None:
        """Requires that no learner step is taken before its time."""
        env_steps, learner_steps = self._began
        allowed = self.due(self.director.env_steps, 0, 0)
        if self._began != (0, 0):  # what was owed then is forgotten
            starts_at = min(env_steps, max(self.director.machine.actors.rate_limiter.replay_starts_at, 0))
            allowed -= self.due(env_steps, starts_at, 0) - learner_steps - 1
            allowed = max(allowed, learner_steps)
        taken = self.director.learner_steps + num_steps_under_way
        require("the replay ratio stays within its bounds", taken <= allowed, taken, allowed)

    def check_actors_wait(self, num_chunks_before: int, most_rounds: int) -> None:
        """Requires that actors that were just asked for a chunk aren't far ahead of the learner."""
        director, limiter = self.director, self.director.machine.actors.rate_limiter
        num_chunks = sum(actor.num_chunks_under_way for actor in director.machine.actors.each)
        if num_chunks > num_chunks_before:
            pool, agent = self.config.topology.actor_pool, self.config.agent
            coming = director.env_steps + (num_chunks - 1) * self.env_steps_per_chunk
            ahead = self.due(coming, limiter.replay_starts_at, limiter._learner_steps_then) - director.learner_steps
            wave = CHUNKS_AHEAD * pool.num_lanes * pool.rows_per_chunk / agent.env_steps_per_learner_step
            most = most_rounds * self.ledger.num_batches + wave + 1
            require("the replay ratio stays within its bounds", ahead <= most, ahead, most)

    def check_rows(self, kept: set[ChunkId], num_inserting: int) -> None:
        """Requires that every row counts once.

        Args:
          kept: chunks that are in the replay now.
          num_inserting: chunks whose storing is under way.
        """
        counted = (self.director.env_steps - self._began[0]) / self.env_steps_per_chunk
        stored = self.ledger.stored
        require("no row counts that isn't stored, or twice", counted <= len(stored), counted, len(stored))
        num_kept = len(kept & stored)
        require("every row that is stored counts", num_kept <= counted + num_inserting, num_kept, counted)

    def kept(self) -> set[ChunkId]:
        """Returns what the shards of the replay keep."""
        kept: set[ChunkId] = set()
        for process in self.director._shards:
            if process.handle.model is not None:
                kept.update(*(segment.chunks for segment in process.handle.model.segments))
        return kept

    def check_replay(self) -> None:
        """Requires that what is thought to be under way to the shards is under way."""
        replay = self.director.machine.replay
        num_inserting, num_returning = self.under_way["insert"], self.under_way["set_priorities"]
        require(
            "what is thought to be under way is under way",
            (replay._num_inserting, replay._num_returning) == (num_inserting, num_returning), num_inserting,
            num_returning,
        )  # fmt: skip
        self.check_rows(self.kept(), num_inserting)

    def check_chunks(self, method: str, num_elsewhere: int) -> None:
        """Requires that as many chunks are under way as is thought, and no more than there may be."""
        num_chunks = 0
        for actor in self.director.machine.actors.each:
            num_chunks += actor.num_chunks_under_way
            num_acting = self.under_way[self.director._processes[actor.process], method]
            is_bounded = num_acting <= actor.num_chunks_under_way <= CHUNKS_AHEAD
            require("nothing in flight exceeds its bound", is_bounded, actor)
        num_under_way = self.under_way[method] + num_elsewhere
        require("what is thought to be under way is under way", num_chunks == num_under_way, num_chunks, num_under_way)

    def check_no_row_is_forgotten(self, kept: set[ChunkId]) -> None:
        """Requires, at rest, that all that living actors have made is stored, waits to be stored, or was lost."""
        waiting = {arrived.chunk.place.value for arrived in getattr(self.director.machine, "_arrived", ())}
        current = {process.handle for process in self.director._actors}
        for chunk, host in self.ledger.made.items():
            if host in current and chunk not in self.ledger.stored and chunk not in waiting:
                under_way = [call for process in self.director._actors for call in process.calls if call.results]
                require("no row is forgotten", bool(under_way) or not self.world.is_one_machine, chunk)


class ActorLearnerRig(ReplayRig):
    """A director of actor-learner."""

    def __init__(self, world: World, config: TrainConfig, num_batches: int = 2) -> None:
        self._num_batches = num_batches
        super().__init__(world, config)

    def make_director(self) -> ActorLearnerDirector:
        self.begin_counting()
        self.ledger.num_batches = self._num_batches
        for kind, model in MODELS.items():
            self.world.models[kind] = lambda *arguments, model=model: model(self.ledger, *arguments)
        return ActorLearnerDirector(
            self.config, self._num_batches, lambda state, _: state["learner"], lambda state, _: state.get("replay")
        )

    def turn(self) -> None:
        before = sum(actor.num_chunks_under_way for actor in self.director.machine.actors.each)
        super().turn()
        self.check_actors_wait(before, ROUNDS_AHEAD)

    def check(self) -> None:
        director = self.director
        self.check_replay()
        num_inserting = director.machine.replay._num_inserting
        self.check_chunks("collect", num_inserting + len(director.machine._arrived))
        num_rounds = self.under_way["learn"]
        require("what is thought to be under way is under way", num_rounds == len(director.machine._rounds), num_rounds)
        require("nothing in flight exceeds its bound", num_rounds <= ROUNDS_AHEAD, num_rounds)
        self.check_ratio(0)
        self.check_version(director.version)

    def check_at_rest(self) -> None:
        kept = self.kept()
        self.check_no_row_is_forgotten(kept)
        if self.world.is_one_machine:  # a chunk whose node has left may have been stored in a shard that has left, too
            counted = (self.director.env_steps - self._began[0]) / self.env_steps_per_chunk
            require("env_steps are the rows stored", counted == len(self.ledger.stored), counted)

    def progress(self) -> tuple[int, ...]:
        return self.director.env_steps, self.director.learner_steps, self.director.version

    def saved(self) -> tuple[int, dict[str, Any]]:
        learner_steps, leaves = self.director.learner_state()
        parts = list(self.director.snapshots())
        return learner_steps, {"learner": leaves, "replay": join_shards(parts, self.config.topology.actor_pool)}
