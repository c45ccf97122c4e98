"""A shard of a replay: one segment for each of its actors, whose chunks arrive independently of each other."""

import collections
import dataclasses
import math
import time
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ActorPool, TrainConfig
from qfleet.core.keys import Stream, key_of
from qfleet.core.replay import (
    NO_STEP,
    DrawShare,
    Replay,
    ReplayState,
    Sample,
    SavedReplay,
    make_replay,
    num_ring_rows,
    priorities,
)
from qfleet.core.types import EnvSpec, Transition
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.topologies.fleet.actor import Chunk
from qfleet.topologies.fleet.env_and_agent import actor_pool_of, make_env_and_agent

_SPARE = 1.25
"""Size of one draw of a shard, as a multiple of its fair share of a batch. A larger share takes a second draw."""

_KEPT_SAMPLES = 64
"""Number of draws whose priorities are still awaited. Those from a learner that died never arrive."""

T = TypeVar("T")


class ShardStats(NamedTuple):
    """What a shard holds."""

    total_priority: float
    """Sum of the priorities of its transitions."""
    num_transitions: int
    """Number of transitions that can be drawn."""
    busy_seconds: float
    """Time that the shard spent on the call."""


Totals = tuple[Array, Array]

EMPTY_SHARD = ShardStats(0.0, 0, 0.0)


class InsertReply(NamedTuple):
    """What becomes of a chunk that a shard is to store."""

    stats: ShardStats
    """What the shard holds afterwards."""
    is_stored: bool
    """Whether the chunk was stored: not if it was there already, or if its actor has been replaced since."""


class SampleReply(NamedTuple, Generic[T]):
    """A share of a draw."""

    stats: ShardStats
    """What the shard holds."""
    transitions: T
    """`[num_draws, ...]`: a `Transition` of NumPy arrays, or a reference to it."""


class Writer(NamedTuple):
    """The actor that last wrote to a segment."""

    incarnation: int = -1
    """Number of actors that held its place before it; -1 if nobody has written."""
    num_chunks: int = 0
    """Number of chunks that this incarnation has sent."""


class Admission(NamedTuple):
    """How a segment takes a chunk."""

    is_cut: bool
    """Whether the chunk does not continue the newest row: another actor begins, or chunks are missing in between."""
    writer: Writer
    """The last writer from now on."""


def admit(last: Writer, writer: Writer) -> Admission | None:
    """Returns how a segment takes a chunk; None if the chunk is there already, or its actor has been replaced since.

    Args:
      last: the last writer of the segment.
      writer: the actor's incarnation, and the number of chunks that this incarnation had sent before.
    """
    if writer < last:
        return None
    return Admission(writer != last, writer._replace(num_chunks=writer.num_chunks + 1))


class ReplayShard:
    """Keeps what some of the actors produce, and draws from it."""

    def __init__(self, config: TrainConfig, number: int, stored: EnvSpec | None = None, carry_size: int = 0) -> None:
        """Makes an empty shard.

        Args:
          config: of the run.
          number: of the shard, from 0.
          stored: `EnvAndAgent.stored_spec`, if this process has built it already.
          carry_size: `Agent.carry_size` of that agent.
        """
        enable_compilation_cache()
        pool = actor_pool_of(config)
        if stored is None:
            built = make_env_and_agent(config)
            stored, carry_size = built.stored_spec, built.agent.carry_size
        self.replay = make_shard_replay(config, pool, number, stored, carry_size)
        self._writers = [Writer()] * len(pool.actors_of(number))
        self.state: ReplayState = jax.jit(self.replay.init)()
        self._totals: tuple[Any, Any] = (0.0, 0)
        self._samples: collections.OrderedDict[int, list[Sample]] = collections.OrderedDict()
        self._num_shards = pool.num_shards
        self._insert_jitted = jax.jit(self._insert_rows, donate_argnums=0)
        self._cut = jax.jit(self.replay.cut, donate_argnums=0)
        self._sample_jitted = jax.jit(self._sample_some, static_argnums=5)
        self._set_priorities_jitted = jax.jit(self._set_some_priorities, donate_argnums=0)

    def insert(self, segment: int, writer: Writer, chunk: Chunk) -> InsertReply:
        """Stores a chunk, unless it is stored already or its actor has been replaced since.

        Args:
          segment: the actor's position among the actors of this shard.
          writer: the actor's incarnation, and the number of chunks that this incarnation had sent before.
          chunk: `[rows, lanes]`.
        """
        started = time.perf_counter()
        admission = admit(self._writers[segment], writer)
        if admission is not None:
            if admission.is_cut:
                self.state = self._cut(self.state, np.int32(segment))
            self.state, self._totals = self._insert_jitted(self.state, chunk, np.int32(segment))
            self._writers[segment] = admission.writer
        return InsertReply(self.stats(started), admission is not None)

    def sample_share(
        self, number: int, seed: int, importance_exponent: float, share: DrawShare, most: int
    ) -> SampleReply[Transition]:
        """Draws this shard's share of a batch, or of a round of batches.

        Args:
          number: identifies the draw when its priorities come back.
          seed: 32 bits, different for each draw.
          importance_exponent: beta.
          share: how much this shard draws, and from where.
          most: the largest number of draws that one shard may get, which is the size of the whole batch or round.
        """
        started = time.perf_counter()
        num_draws, size = int(share.num_draws), min(most, math.ceil(_SPARE * most / self._num_shards))
        seed_of_draw, exponent = np.uint32(seed), np.float32(importance_exponent)
        samples = [  # all of one size, because each size would need its own compiled program of about 10 MB
            self._sample_jitted(self.state, seed_of_draw, exponent, share, np.int32(first), size)
            for first in range(0, num_draws, size)
        ]
        transition = jax.tree.map(
            lambda *x: np.concatenate(x)[:num_draws] if len(x) > 1 else np.asarray(x[0])[:num_draws],
            *(sample.transition for sample in samples),
        )
        self._samples[number] = [sample._replace(transition=()) for sample in samples]
        if len(self._samples) > _KEPT_SAMPLES:
            self._samples.popitem(last=False)
        return SampleReply(self.stats(started), transition)

    def set_priorities(self, number: int, priority: np.ndarray) -> ShardStats:
        """Sets the priorities of a draw's transitions.

        A row that has been overwritten since the draw keeps its priority. If the draw is no longer remembered, nothing
        changes.

        Args:
          number: of the draw, as given to `sample_share`.
          priority: `[num_draws]`, as for `Replay.set_priorities`.

        Returns:
          What the shard holds afterwards.
        """
        started = time.perf_counter()
        first = 0
        for sample in self._samples.pop(number, ()):
            size = len(sample.slot)
            padded = np.zeros(size, np.float32)  # also for surplus draws, whose priorities don't change
            own = priority[first : first + size]
            padded[: len(own)] = own
            self.state, self._totals = self._set_priorities_jitted(self.state, sample, padded)
            first += size
        return self.stats(started)

    def stats(self, started: float | None = None) -> ShardStats:
        """Returns what the shard holds; `started` is when the work began, by `time.perf_counter`."""
        total_priority, num_transitions = jax.device_get(self._totals)
        busy_seconds = 0.0 if started is None else time.perf_counter() - started
        return ShardStats(float(total_priority), int(num_transitions), busy_seconds)

    def snapshot(self) -> SavedReplay:
        """Returns everything that a checkpoint needs of this shard, as NumPy arrays."""
        state = self.state
        saved: SavedReplay = jax.tree.map(
            np.array, SavedReplay(state.ring, self.replay.leaves(state), state.max_priority)
        )
        return saved

    def restore(self, saved: SavedReplay) -> ShardStats:
        """Goes on from a snapshot, and returns what the shard holds afterwards.

        The actors begin new episodes, so the next chunk doesn't continue the newest row of its segment.
        """
        self.state, self._totals = jax.jit(self._restored)(jax.tree.map(jnp.array, saved))
        self._writers = [Writer()] * len(self._writers)
        self._samples.clear()
        return self.stats()

    # Each program that changes the state also returns its totals. A second program for them would cost as much again.

    def _restored(self, saved: SavedReplay) -> tuple[ReplayState, Totals]:
        state = self.replay.restore(saved)
        return state, _totals(state)

    def _insert_rows(self, state: ReplayState, chunk: Chunk, segment: Array) -> tuple[ReplayState, Totals]:
        def insert(state: ReplayState, inputs: tuple) -> tuple[ReplayState, None]:
            row, td_error = inputs
            # A row without a step after one that goes on: the environment failed in between, so that step is cut short.
            # After the end of an episode, `seal` changes nothing.
            state = self.replay.seal(state, row.outcome == NO_STEP, segment)
            return self.replay.insert(state, row, segment, td_error), None

        state = jax.lax.scan(insert, state, (chunk.rows, chunk.td_error))[0]
        return state, _totals(state)

    def _set_some_priorities(self, state: ReplayState, sample: Sample, priority: Array) -> tuple[ReplayState, Totals]:
        state = self.replay.set_priorities(state, sample, priority)
        return state, _totals(state)

    def _sample_some(
        self, state: ReplayState, seed: Array, exponent: Array, share: DrawShare, first: Array, size: int
    ) -> Sample:
        return self.replay.sample_share(state, key_of(seed, Stream.REPLAY_SHARD, first), exponent, share, first, size)


def _totals(state: ReplayState) -> Totals:
    """Returns the sum of the priorities, and the number of transitions."""
    assert isinstance(state.tree, priorities.SumTree)
    return priorities.total(state.tree), state.num_transitions[0]


def make_shard_replay(
    config: TrainConfig, pool: ActorPool, number: int, stored: EnvSpec, carry_size: int = 0
) -> Replay:
    """Returns the replay of one shard; all segments of a fleet have the same length.

    Uniform sampling uses equal priorities, because draws are dealt to the shards by the priorities that they hold.

    Args:
      config: of the run.
      pool: the actors of the run.
      number: of the shard.
      stored: the spec of observations as the network's `to_storage_layout` keeps them.
      carry_size: `Agent.carry_size`.
    """
    return _make_replay(config, pool, len(pool.actors_of(number)), stored, carry_size)


def make_whole_replay(config: TrainConfig, pool: ActorPool, stored: EnvSpec, carry_size: int = 0) -> Replay:
    """Returns the replays of all shards together, as one replay; the arguments are those of `make_shard_replay`."""
    return _make_replay(config, pool, pool.num_actors, stored, carry_size)


def _make_replay(config: TrainConfig, pool: ActorPool, num_segments: int, stored: EnvSpec, carry_size: int) -> Replay:
    num_lanes = num_segments * pool.lanes_per_actor
    num_rows = num_ring_rows(config.agent, pool.num_lanes)
    agent = dataclasses.replace(config.agent, replay_capacity=num_rows * num_lanes, replay="prioritised")
    if config.agent.replay == "uniform":
        agent = dataclasses.replace(agent, priority_exponent=0.0)
    return make_replay(stored, agent, num_lanes, num_segments=num_segments, carry_size=carry_size)
