"""A network that plays without exploring, as evaluations, videos and trained policies need it."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from qfleet.core.activity import Activity, make_with_activity
from qfleet.core.memory import MemoryState, make_memory
from qfleet.core.types import Network, Params


class Player(NamedTuple):
    """The pure functions with which a network plays. Observations are those that an environment returns."""

    begin: Callable[[Array], MemoryState]
    """`begin(obs) -> memory`, of episodes that begin with these observations, `[lanes, *observation_shape]`."""
    observe: Callable[[MemoryState, Array, Array], MemoryState]
    """`observe(memory, obs, is_first) -> memory`, as `Memory.observe` does."""
    values: Callable[[Params, MemoryState], tuple[Array, MemoryState, Activity]]
    """`values(params, memory) -> q, memory, activity`: `[lanes, num_actions]` float32, what to remember from now on,
    and how active each hidden unit was, `[lanes, units]` for each layer. Activities of recurrent networks aren't
    measured."""


def make_player(network: Network, frame_stack: int = 1) -> Player:
    """Returns the functions with which `network` plays.

    Args:
      network: the network.
      frame_stack: number of frames that the agent sees at once.
    """
    memory, store = make_memory(network, frame_stack), network.to_storage_layout
    with_activity, recurrence = make_with_activity(network), network.recurrence

    def begin(obs: Array) -> MemoryState:
        return memory.init(store(obs))

    def observe(state: MemoryState, obs: Array, is_first: Array) -> MemoryState:
        return memory.observe(state, store(obs), is_first)

    def values(params: Params, state: MemoryState) -> tuple[Array, MemoryState, Activity]:
        if recurrence is None:
            q, activity = with_activity(params, state.view)
            return q, state, activity
        is_first = jnp.zeros(len(state.view), bool)  # `observe` has reset those that are
        carry, outputs = recurrence.step(params, state.carry, state.view, is_first, None)
        return recurrence.q_values(outputs), state._replace(carry=carry), ()

    return Player(begin, observe, values)
