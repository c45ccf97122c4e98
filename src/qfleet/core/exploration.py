"""How actions are drawn, and how exploration decays.

One uniform number per lane decides an action, so the numbers of many steps can be drawn at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig
from qfleet.config.own_parts import make_own_function
from qfleet.core.masks import is_valid_in, nth_valid

Explore = Callable[[Array, Array, Array], Array]
"""`explore(q, exploration, uniform) -> action`, as `epsilon_greedy` and `softmax` do."""


def make_explore(config: AgentConfig, *, is_masked: bool = False) -> Explore:
    """Returns the function that draws the actions of an agent.

    Raises:
      ConfigError: if it is a user's, and their function can't be imported or doesn't return a function.
    """
    if config.exploration in ("epsilon_greedy", "softmax"):
        return explorer(config.exploration, is_masked=is_masked)
    return make_own_function("exploration", config.exploration, "explore(q, exploration, uniform)", config)


def epsilon_greedy(q: Array, epsilon: Array, uniform: Array) -> Array:
    """Returns a uniformly random action with probability `epsilon`, and otherwise the greedy one (the first, in a tie).

    Args:
      q: `[..., num_actions]` float.
      epsilon: `[]` or `[...]` float, a probability.
      uniform: `[...]` float in [0, 1). Below epsilon, `uniform / epsilon` is itself uniform and picks the action.

    Returns:
      `[...]` int32.
    """
    num_actions = q.shape[-1]
    picked = jnp.floor(uniform / jnp.maximum(epsilon, jnp.finfo(q.dtype).tiny) * num_actions)
    random_action = jnp.clip(picked, 0, num_actions - 1).astype(jnp.int32)
    return jnp.where(uniform < epsilon, random_action, greedy(q))


def softmax(q: Array, temperature: Array, uniform: Array) -> Array:
    """Returns actions drawn with probabilities softmax(q / temperature) (Boltzmann exploration).

    Args:
      q: `[..., num_actions]` float.
      temperature: `[]` or `[...]` float above 0, in units of discounted reward.
      uniform: `[...]` float in [0, 1). Its place among the cumulated probabilities is the action.

    Returns:
      `[...]` int32.
    Source: Sutton and Barto 2018, section 2.8.
    """
    cumulated = jnp.cumsum(jax.nn.softmax(q / jnp.asarray(temperature)[..., None], axis=-1), axis=-1)
    # Rounding may leave the last sum below 1. Scaling by it keeps the last action's share.
    return jnp.sum(uniform[..., None] * cumulated[..., -1:] >= cumulated[..., :-1], axis=-1, dtype=jnp.int32)


def masked_epsilon_greedy(q: Array, epsilon: Array, uniform: Array) -> Array:
    """Returns a uniformly random valid action with probability `epsilon`, and otherwise the greedy one.

    Args and Returns: as for `epsilon_greedy`, where `q` is that of `qfleet.core.masks.with_invalid`.
    """
    is_valid = is_valid_in(q)
    num_valid = jnp.sum(is_valid, axis=-1, dtype=jnp.int32)
    picked = jnp.floor(uniform / jnp.maximum(epsilon, jnp.finfo(q.dtype).tiny) * num_valid)
    random_action = nth_valid(is_valid, jnp.clip(picked, 0, num_valid - 1).astype(jnp.int32))
    return jnp.where(uniform < epsilon, random_action, greedy(q))


def masked_softmax(q: Array, temperature: Array, uniform: Array) -> Array:
    """Returns actions drawn with probabilities softmax(q / temperature) among the valid ones.

    Args and Returns: as for `softmax`, where `q` is that of `qfleet.core.masks.with_invalid`.
    """
    is_valid = is_valid_in(q)
    scaled = jnp.where(is_valid, q / jnp.asarray(temperature)[..., None], -jnp.inf)
    cumulated = jnp.cumsum(jax.nn.softmax(scaled, axis=-1), axis=-1)
    # Only valid actions are counted, so that no rounding of the sums lets one between them win.
    is_passed = is_valid & (uniform[..., None] * cumulated[..., -1:] >= cumulated)
    last = jnp.sum(is_valid, axis=-1, dtype=jnp.int32) - 1
    return nth_valid(is_valid, jnp.minimum(jnp.sum(is_passed, axis=-1, dtype=jnp.int32), last))


def explorer(kind: str, *, is_masked: bool) -> Callable[[Array, Array, Array], Array]:
    """Returns the function that explores in this way: `AgentConfig.exploration`."""
    if kind == "softmax":
        return masked_softmax if is_masked else softmax
    return masked_epsilon_greedy if is_masked else epsilon_greedy


class Repetition(NamedTuple):
    """A random action that is repeated, `[lanes]` int32 each."""

    action: Array
    num_left: Array
    """Number of steps that it still takes; 0 if no action is repeated."""


def no_repetition(num_lanes: int) -> Repetition:
    """Returns the state in which no lane repeats an action."""
    zeros = jnp.zeros(num_lanes, jnp.int32)
    return Repetition(zeros, zeros)


def make_repeat(config: AgentConfig) -> Callable[[Array, Array, Array, Repetition], tuple[Array, Repetition]]:
    """Returns the function that makes epsilon-z-greedy of epsilon-greedy.

    `repeat(action, epsilon, uniform, repetition) -> action, repetition` takes the actions of `epsilon_greedy`, its
    arguments, and the repetitions under way. Where an action is random, it is repeated for as many steps in all as a
    number that is drawn from a zeta distribution, up to `config.exploration_max_duration`.

    Source: Dabney et al. 2021, arXiv 2006.01782, algorithm 1.
    """
    survival = duration_survival(config.exploration_duration_exponent, config.exploration_max_duration)

    def repeat(action: Array, epsilon: Array, uniform: Array, repetition: Repetition) -> tuple[Array, Repetition]:
        # The action is made of the uniform number itself, so the duration is made of a number mixed from its bits.
        mixed = _mix(jax.lax.bitcast_convert_type(uniform, jnp.uint32))
        share = (mixed.astype(jnp.float32) + 1.0) / 2.0**32
        duration = 1 + jnp.searchsorted(-survival, -share).astype(jnp.int32)
        is_repeated = repetition.num_left > 0
        action = jnp.where(is_repeated, repetition.action, action)
        begun = jnp.where(uniform < epsilon, duration - 1, 0)
        return action, Repetition(action, jnp.where(is_repeated, repetition.num_left - 1, begun))

    return repeat


def duration_survival(exponent: float, maximum: int) -> np.ndarray:
    """Returns the probabilities that a repetition takes more than 1, 2 ... `maximum - 1` steps, float32."""
    weights = np.arange(1, maximum + 1, dtype=np.float64) ** -exponent
    beyond = np.cumsum(weights[::-1])[::-1]  # from the smallest up, so that none is lost
    return (beyond[1:] / beyond[0]).astype(np.float32)


def _mix(bits: Array) -> Array:
    """Returns numbers in which each bit depends on all bits of `bits`, `[...]` uint32 (the end of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def greedy(q: Array) -> Array:
    """Returns the action with the greatest value, the first one in a tie: `[..., num_actions]` to `[...]` int32."""
    return jnp.argmax(q, axis=-1).astype(jnp.int32)


def exploration_at(config: AgentConfig, env_steps: np.ndarray) -> np.ndarray:
    """Returns epsilon, or the temperature, after `env_steps` environment steps.

    It stays at its start until learning begins, because the actions of an untrained network are worth no more than
    random ones.

    Args:
      env_steps: any shape, int64, over all lanes.

    Returns:
      The same shape, float32.
    Source: Mnih et al. 2015, Nature 518, extended data table 1: a uniform policy runs before learning starts.
    """
    decayed = np.clip((env_steps - config.exploration_begins) / config.exploration_env_steps, 0.0, 1.0)
    start, end = config.exploration_start, config.exploration_end
    if config.exploration_schedule == "exponential":
        return (start * (end / start) ** decayed).astype(np.float32)
    return (start + (end - start) * decayed).astype(np.float32)


def importance_exponent_at(config: AgentConfig, env_steps: np.ndarray) -> np.ndarray:
    """Returns beta, the share of the sampling bias that weights correct, after `env_steps` environment steps.

    Args:
      env_steps: any shape, int64, over all lanes.

    Returns:
      The same shape, float32.
    Source: Schaul et al. 2016, arXiv 1511.05952, section 3.4.
    """
    start, length = config.importance_exponent_start, config.importance_exponent_env_steps
    if length is None:
        raise ValueError("importance_exponent_env_steps must be a number once a run has begun, got None")
    return (start + (1.0 - start) * np.clip(env_steps / length, 0, 1)).astype(np.float32)
