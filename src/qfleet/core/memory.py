"""What an agent remembers of each lane from one row to the next.

Topologies pass it on, and store `view` and `carry` with the rows that the agent learns from. They know nothing else of
it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.core.frame_stack import init_view, push_frame
from qfleet.core.types import EnvSpec, Network


class MemoryState(NamedTuple):
    """What an agent remembers. Every array has a leading axis `[lanes]`, and parts that an agent lacks are `()`."""

    view: Array
    """What the network sees next: the newest observation in its storage layout, or a stack of the newest frames."""
    carry: Any = ()
    """What a recurrent network remembers of the episode before `view`."""
    explorer: Any = ()
    """What the explorer remembers."""


class Memory(NamedTuple):
    """How an agent remembers, as pure functions. Observations are those of the network's `to_storage_layout`."""

    init: Callable[[Array], MemoryState]
    """`init(obs) -> memory`, of lanes whose episodes begin with these observations, `[lanes, *observation_shape]`."""
    observe: Callable[[MemoryState, Array, Array], MemoryState]
    """`observe(memory, obs, is_first) -> memory`, after the lanes have come to these observations. Where one starts an
    episode, `is_first [lanes]` bool, nothing from before is remembered."""


def make_memory(network: Network, frame_stack: int = 1, init_explorer: Callable[[int], Any] | None = None) -> Memory:
    """Returns the memory of an agent: of frames, of a recurrent network and of an explorer, as far as it has them.

    Args:
      network: the agent's network.
      frame_stack: number of frames that the agent sees at once.
      init_explorer: `init_explorer(num_lanes) -> state`, what the explorer remembers at the start of an episode. None
        if it remembers nothing.
    """

    def init_rest(num_lanes: int) -> tuple[Any, Any]:
        carry = () if network.recurrence is None else network.recurrence.initial(num_lanes)
        return carry, () if init_explorer is None else init_explorer(num_lanes)

    def init(obs: Array) -> MemoryState:
        return MemoryState(init_view(obs, frame_stack), *init_rest(len(obs)))

    def observe(memory: MemoryState, obs: Array, is_first: Array) -> MemoryState:
        view = push_frame(memory.view, obs, is_first, frame_stack)

        def unless_first(fresh: Array, kept: Array) -> Array:
            return jnp.where(is_first.reshape(is_first.shape + (1,) * (kept.ndim - 1)), fresh, kept)

        rest = jax.tree.map(unless_first, init_rest(len(obs)), (memory.carry, memory.explorer))
        return MemoryState(view, *rest)

    return Memory(init, observe)


def memory_shapes(memory: Memory, stored: EnvSpec, num_lanes: int) -> MemoryState:
    """Returns the shapes of what is remembered of `num_lanes` lanes of an environment with this `stored_spec`."""
    obs = jax.ShapeDtypeStruct((num_lanes, *stored.observation_shape), stored.observation_dtype)
    shapes: MemoryState = jax.eval_shape(memory.init, obs)
    return shapes
