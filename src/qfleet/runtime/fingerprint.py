"""Fingerprints of episodes, by which an evaluation counts the different ones.

The fingerprint of an episode is a hash of all that the agent saw in it: each observation and each reward, in order.
So two episodes with one fingerprint are one and the same experience, and the second adds no evidence. Actions are left
out, since an action that changes nothing makes no other episode. A hash has 32 bits: among 100 different episodes, two
have the same one with a probability of one in a million.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MAX_UNROLLED = 16
"""Most numbers of an observation that are added up one by one. XLA merges that with other work, unlike a reduction."""

_SEED = 0
"""Seed of the multipliers of the compiled hash."""


def extend_fingerprints(fingerprints: Array, obs: Array, reward: Array) -> Array:
    """Returns the fingerprints of episodes after one more observation and reward each. Any program can compile it.

    Args:
      fingerprints: `[lanes]` uint32, 0 before the first observation.
      obs: `[lanes, ...]`, the observations that follow.
      reward: `[lanes]` float32, the rewards that came with them; 0 with the first observation.
    """
    words = _words(obs.reshape(len(obs), -1))
    # A sum of products with random odd numbers, modulo 2**32, tells apart any two observations that differ in one
    # number, and any others with a probability of all but 2**-32.
    multipliers = np.random.default_rng(_SEED).integers(0, 2**31, words.shape[1], np.uint32) * np.uint32(2) + 1
    if len(multipliers) <= MAX_UNROLLED:
        seen = sum((words[:, i] * factor for i, factor in enumerate(multipliers)), jnp.uint32(0))
    else:
        seen = jnp.sum(words * multipliers, axis=1, dtype=jnp.uint32)
    return _mix(_mix(fingerprints ^ seen) ^ _words(reward))


def _words(numbers: Array) -> Array:
    """Returns each number as 32 bits."""
    if jnp.issubdtype(numbers.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.uint32)
    return numbers.astype(jnp.uint32)


def _mix(word: Array) -> Array:
    """Returns 32 bits that all depend on all bits of `word`, as MurmurHash3's last step does. Words stay different."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


class HostFingerprints:
    """The fingerprints of the episodes under way in lanes outside the compiled program."""

    def __init__(self, obs: np.ndarray) -> None:
        """Begins an episode in every lane with its first observation, `[lanes, ...]`."""
        self.values = np.zeros(len(obs), np.uint32)
        """`[lanes]`, of the episodes so far."""
        self.begin(np.ones(len(obs), bool), obs)

    def begin(self, where: np.ndarray, obs: np.ndarray) -> None:
        """Begins new episodes, with their first observations, in the lanes where `where`, `[lanes]` bool, is True."""
        obs = np.ascontiguousarray(obs)
        for lane in np.flatnonzero(where):
            self.values[lane] = zlib.crc32(obs[lane].tobytes())

    def extend(self, obs: np.ndarray, reward: np.ndarray) -> None:
        """Adds to the episode of each lane an observation, `[lanes, ...]`, and the reward that came with it."""
        obs, reward = np.ascontiguousarray(obs), np.asarray(reward, np.float32)
        for lane, value in enumerate(self.values.tolist()):
            self.values[lane] = zlib.crc32(obs[lane].tobytes() + reward[lane].tobytes(), value)
