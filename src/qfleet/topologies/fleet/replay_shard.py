"""A shard of a replay: a segment for each of some actors, which insert on their own."""

import collections
import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import ActorPool, RayTopologyConfig, TrainConfig
from qfleet.core.keys import key_of
from qfleet.core.replay import NO_STEP, DrawShare, Replay, ReplayState, Sample, SavedReplay, make_replay, priorities
from qfleet.core.types import EnvSpec, Transition, stored_spec
from qfleet.envs.registry import make_env
from qfleet.networks import make_network
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.topologies.fleet.actor import Chunk

_SPARE = 1.25
"""Of what a shard draws at once, as a multiple of its fair share: what is more takes a second turn."""

_KEPT_SAMPLES = 64
"""Draws whose errors may still come; those of a learner that died never do."""


_HEADS = ("cursor", "size", "insertions")
"""Fields of a ring with one number for each segment."""


class ShardStats(NamedTuple):
    """What a shard holds."""

    priority: float
    """Sum over its transitions."""
    num_transitions: int
    """That can be drawn."""
    busy_seconds: float
    """That it took to answer."""


EMPTY_SHARD = ShardStats(0.0, 0, 0.0)


class Writer(NamedTuple):
    """Who wrote to a segment last."""

    incarnation: int = -1
    num_chunks: int = 0
    """Of this incarnation."""


class ReplayShard:
    """Keeps what some actors produce, and draws from it."""

    def __init__(self, config: TrainConfig, number: int) -> None:
        """Makes it empty.

        Args:
          config: of the run.
          number: of the shard, from 0.
        """
        pool = config.topology_as(RayTopologyConfig).actor_pool
        enable_compilation_cache()
        self.replay = make_shard_replay(config, number, stored_spec_of(config))
        self._writers = [Writer()] * len(pool.actors_of(number))
        self.state: ReplayState = jax.jit(self.replay.init)()
        self._samples: collections.OrderedDict[int, list[Sample]] = collections.OrderedDict()
        self._num_shards = pool.num_shards
        self._insert = jax.jit(self._insert_rows, donate_argnums=0)
        self._cut = jax.jit(self.replay.cut, donate_argnums=0)
        self._draw = jax.jit(self._draw_share, static_argnums=5)
        self._set_priorities = jax.jit(self.replay.set_priorities, donate_argnums=0)
        self._stock = jax.jit(lambda state: (priorities.total(state.tree), state.num_transitions[0]))

    def insert(self, segment: int, writer: Writer, chunk: Chunk) -> tuple[ShardStats, bool]:
        """Stores a chunk, unless it has been stored already or its actor has been replaced since.

        Args:
          segment: the actor's place among those of this shard.
          writer: the actor's incarnation, and how many chunks that one had sent before.
          chunk: `[rows, lanes]`.

        Returns:
          What the shard holds then, and whether it was stored.
        """
        started = time.perf_counter()
        last = self._writers[segment]
        is_new = writer >= last
        if is_new:
            if writer != last:  # it is another incarnation, or chunks are missing in between
                self.state = self._cut(self.state, np.int32(segment))
            self.state = self._insert(self.state, chunk, np.int32(segment))
            self._writers[segment] = writer._replace(num_chunks=writer.num_chunks + 1)
        return self.stock(started), is_new

    def sample(
        self, number: int, seed: int, importance_exponent: float, share: DrawShare, most: int
    ) -> tuple[ShardStats, Transition]:
        """Draws its part of a batch.

        Args:
          number: by which the errors will come back.
          seed: of the draws, 32 bits, another one for each.
          importance_exponent: beta.
          share: how much of the whole it is.
          most: that fall to one part.

        Returns:
          What it holds, and the transitions, `[share.num_draws, ...]` NumPy arrays.
        """
        started = time.perf_counter()
        num_draws, size = int(share.num_draws), min(most, math.ceil(_SPARE * most / self._num_shards))
        samples = [  # of one size, for a program of each size would take some 10 MB
            self._draw(self.state, np.uint32(seed), np.float32(importance_exponent), share, np.int32(first), size)
            for first in range(0, num_draws, size)
        ]
        transition = jax.tree.map(
            lambda *x: np.concatenate(x)[:num_draws] if len(x) > 1 else np.asarray(x[0])[:num_draws],
            *(sample.transition for sample in samples),
        )
        self._samples[number] = [sample._replace(transition=()) for sample in samples]
        if len(self._samples) > _KEPT_SAMPLES:
            self._samples.popitem(last=False)
        return self.stock(started), transition

    def set_priorities(self, number: int, td_error: np.ndarray) -> ShardStats:
        """Gives the transitions of a draw, `[num_draws]`, the priorities of their errors.

        What has been overwritten since then keeps its own; so do all, where the draw is forgotten.
        """
        started = time.perf_counter()
        first = 0
        for sample in self._samples.pop(number, ()):
            size = len(sample.slot)
            errors = np.zeros(size, np.float32)  # of what was drawn beyond the part, too, which keeps its priority
            own = td_error[first : first + size]
            errors[: len(own)] = own
            self.state = self._set_priorities(self.state, sample, errors)
            first += size
        return self.stock(started)

    def stock(self, started: float | None = None) -> ShardStats:
        """Returns what it holds; `started` is when the work began, by the performance counter."""
        priority, num_transitions = jax.device_get(self._stock(self.state))
        busy_seconds = 0.0 if started is None else time.perf_counter() - started
        return ShardStats(float(priority), int(num_transitions), busy_seconds)

    def snapshot(self) -> SavedReplay:
        """Returns all that it must keep, as NumPy arrays."""
        state = self.state
        saved: SavedReplay = jax.tree.map(
            np.array, SavedReplay(state.ring, self.replay.leaves(state), state.max_priority)
        )
        return saved

    def restore(self, saved: SavedReplay) -> ShardStats:
        """Goes on from a snapshot, and returns what it holds then. Nothing goes on where its segments end."""
        self.state = jax.jit(self.replay.restore)(jax.tree.map(jnp.array, saved))
        self._writers = [Writer()] * len(self._writers)
        self._samples.clear()
        return self.stock()

    def _insert_rows(self, state: ReplayState, chunk: Chunk, segment: Array) -> ReplayState:
        def insert(state: ReplayState, inputs: tuple) -> tuple[ReplayState, None]:
            row, td_error = inputs
            state = self.replay.seal(state, row.outcome == NO_STEP, segment)
            return self.replay.insert(state, row, segment, td_error), None

        return jax.lax.scan(insert, state, (chunk.rows, chunk.td_error))[0]

    def _draw_share(
        self, state: ReplayState, seed: Array, exponent: Array, share: DrawShare, first: Array, size: int
    ) -> Sample:
        return self.replay.sample_share(state, key_of(seed, first), exponent, share, first, size)


def make_shard_replay(config: TrainConfig, number: int, stored: EnvSpec) -> Replay:
    """Returns the replay of one shard: all segments of a fleet are equally long.

    Uniform sampling is by equal priorities there, for draws are dealt to the shards by what they hold.

    Args:
      config: of the run.
      number: of the shard.
      stored: the spec of observations as the network's `to_storage_layout` keeps them.
    """
    return _make_replay(config, len(config.topology_as(RayTopologyConfig).actor_pool.actors_of(number)), stored)


def make_whole_replay(config: TrainConfig, stored: EnvSpec) -> Replay:
    """Returns what the replays of all shards are together, as one."""
    return _make_replay(config, config.topology_as(RayTopologyConfig).actor_pool.num_actors, stored)


def _make_replay(config: TrainConfig, num_segments: int, stored: EnvSpec) -> Replay:
    pool = config.topology_as(RayTopologyConfig).actor_pool
    num_lanes = num_segments * pool.lanes_per_actor
    num_rows = config.agent.replay_capacity // pool.num_lanes
    agent = dataclasses.replace(config.agent, replay_capacity=num_rows * num_lanes, replay="prioritised")
    if config.agent.replay == "uniform":
        agent = dataclasses.replace(agent, priority_exponent=0.0)
    return make_replay(stored, agent, num_lanes, num_segments=num_segments)


def deal(size: int, priorities: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many of `size` draws fall to each shard, `[shards]`, and the share of the whole that each has.

    As many as its share of the priorities says, rounded up or down at random: on average exactly so many.
    """
    shares = priorities / priorities.sum()
    ends = np.floor(np.cumsum(shares) * size + random.random()).astype(np.int64)
    ends[-1] = size
    return np.diff(np.minimum(ends, size), prepend=0), shares


def put_together(places: list[np.ndarray], parts: tuple[Transition, ...]) -> Transition:
    """Returns the transitions that several shards have drawn as one, each in its place.

    Args:
      places: for each part, where its transitions go, `[num_draws]`.
      parts: `[num_draws, ...]`, NumPy arrays.
    """
    size = sum(map(len, places))

    def join(*columns: np.ndarray) -> np.ndarray:
        joined = np.empty((size, *columns[0].shape[1:]), columns[0].dtype)
        for place, column in zip(places, columns, strict=True):
            joined[place] = column
        return joined

    together: Transition = jax.tree.map(join, *parts)
    return together


def join_shards(parts: Iterable[SavedReplay], pool: ActorPool) -> SavedReplay:
    """Returns the whole replay, lanes and segments in the order of their actors, from what each shard keeps.

    Each part is copied before the next is asked for: it may be large. The arrays are not for writing to.
    """
    whole: Any = None
    greatest = []
    for number, part in enumerate(parts):
        whole = whole or _empty_whole(part, pool)
        _copy_share(whole, part, pool, number)
        greatest.append(part.max_priority)
    jax.tree.map(lambda x: x.setflags(write=False), (whole.ring, whole.leaves))
    joined: SavedReplay = whole._replace(max_priority=max(greatest, key=float))
    return joined


def _empty_whole(part: SavedReplay, pool: ActorPool) -> SavedReplay:
    def lanes(x: Any) -> Any:
        return np.empty((len(x), pool.num_lanes, *x.shape[2:]), x.dtype)

    heads: Any = {name: np.empty(pool.num_actors, getattr(part.ring, name).dtype) for name in _HEADS}
    ring = part.ring._replace(rows=jax.tree.map(lanes, part.ring.rows), **heads)
    return part._replace(ring=ring, leaves=jax.tree.map(lanes, part.leaves))


def _copy_share(whole: Any, part: SavedReplay, pool: ActorPool, number: int) -> None:
    actors = pool.actors_of(number)
    lanes = _lanes_of(actors, pool)
    for to, own in zip(
        jax.tree.leaves((whole.ring.rows, whole.leaves)), jax.tree.leaves((part.ring.rows, part.leaves)), strict=True
    ):
        to[:, lanes] = own
    for name in _HEADS:
        getattr(whole.ring, name)[actors] = getattr(part.ring, name)


def share_of(saved: SavedReplay, pool: ActorPool, number: int) -> SavedReplay:
    """Returns what one shard keeps of the whole replay."""
    actors = pool.actors_of(number)
    lanes = _lanes_of(actors, pool)
    heads: Any = {name: np.asarray(getattr(saved.ring, name))[actors] for name in _HEADS}
    rows, own = jax.tree.map(lambda x: np.asarray(x)[:, lanes], (saved.ring.rows, saved.leaves))
    return SavedReplay(saved.ring._replace(rows=rows, **heads), own, saved.max_priority)


def _lanes_of(actors: list[int], pool: ActorPool) -> np.ndarray:
    each = pool.lanes_per_actor
    return np.concatenate([actor * each + np.arange(each) for actor in actors])


def stored_spec_of(config: TrainConfig) -> EnvSpec:
    """Returns the spec of a run's environment, with observations as its network's `to_storage_layout` keeps them."""
    env: Any = make_env(config.env, **config.env_options)
    return stored_spec(env.spec, make_network(env.spec, config.agent).to_storage_layout)
