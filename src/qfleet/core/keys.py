"""The random streams of a run, and keys by number.

Every random number of a run is named by a path of numbers that begins with the seed and a `Stream`, so that no number
serves two purposes. JAX takes its keys from `key_of(seed, Stream.X, ...)`. NumPy takes a generator from
`np.random.default_rng((seed, Stream.X, ...))`, and environments outside JAX take `seed_of(seed, Stream.X, ...)`.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Stream(enum.IntEnum):
    """What each random stream of a seed is for. A member keeps its number forever: it decides what a seed means."""

    TRAINING = 0
    """A learner in one program with its environments: initial parameters, episodes, exploration, batches."""
    EVALUATION = 1
    """The episodes with which a run evaluates itself."""
    ACTING = 2
    """The episodes and the exploration of an actor in a process of its own."""
    REPLAY_SHARES = 3
    """How a batch is divided over the shards of a replay, and the seeds of the shards' draws."""
    PEER = 4
    """The seed of each peer that gossips. A peer is a run of its own, with all the streams of that seed."""
    EXCHANGES = 5
    """Which of the peers that gossip exchange parameters."""
    WORKER_BATCHES = 6
    """The batches that a worker of a parameter server draws from a replay of its own."""
    REPLAY_SHARD = 7
    """The transitions that a shard of a replay draws, by a seed from `REPLAY_SHARES`."""
    POLICY = 8
    """The episodes of a trained policy, evaluated or filmed. They begin alike, so that a film shows what was scored."""
    LEARNING = 9
    """The noise and the quantile fractions of a learner step that isn't in one program with its environments, or of a
    gradient that a worker of a parameter server computes."""


class Draws(NamedTuple):
    """The keys with which a network draws, besides what it computes."""

    noise: Array
    """Keys of the noise in its layers: one for all samples of a learner step, `[]`, or one for each lane, `[batch]`."""
    samples: Array | None = None
    """One for each sample, `[batch]`, from its number in the whole batch. None lets a network space quantile fractions
    evenly instead of drawing them."""


def draws_of_rows(draws: Draws, num_rows: int) -> Draws:
    """Returns the draws of many rows of lanes, `[rows * lanes]`, from those of the lanes.

    All rows of a lane share their noise. Each sample's key is its lane's and its row's.
    """
    noise = draws.noise if draws.noise.ndim == 0 else jnp.tile(draws.noise, num_rows)
    if draws.samples is None:
        return Draws(noise)
    rows = jnp.arange(num_rows, dtype=jnp.uint32)
    samples = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(draws.samples, rows)
    return Draws(noise, samples.reshape(-1))


NOISE = np.uint32(2**32 - 1)
"""Number of the key, among those derived from one, of the noise and the quantile fractions. The others count from 0."""


def key_shape() -> jax.ShapeDtypeStruct:
    """Returns what stands for a key where only shapes are computed. Making a key would take a program of its own."""
    shape: jax.ShapeDtypeStruct = jax.eval_shape(jax.random.key, 0)
    return shape


def key_of(seed: Array | int | np.uint32, *numbers: Array | int | np.uint32) -> Array:
    """Returns the key at the path that begins with `seed`. Different paths have different keys.

    Args:
      seed: `[]`, below 2**32.
      numbers: `[]` each, below 2**32; the first is a `Stream`.
    """
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def sample_keys(key: Array, numbers: Array) -> Array:
    """Returns a key for each sample, or lane, by its number in the whole batch: `[batch]` integers to `[batch]`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def make_key(*path: int) -> Array:
    """Returns `key_of(*path)` outside of compiled programs, by one program. Each operation would be one of its own."""
    key: Array = _compiled_key_of(*map(np.uint32, path))
    return key


_compiled_key_of = jax.jit(key_of)
