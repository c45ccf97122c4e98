"""Recurrent cells, which carry what a network remembers from one observation of a lane to the next."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qfleet.config import AgentConfig
from qfleet.core.types import Carry


class MemoryCell(nnx.Module):
    """An LSTM or GRU cell, whose state is one array: `[lanes, carry_size]` float32, zeros where an episode starts.

    The bias of the gate that keeps the old state starts at 1, so that gradients reach back further from the beginning
    (Jozefowicz et al. 2015, section 2.2, for LSTMs). All other biases start at 0.

    Source: Hochreiter and Schmidhuber 1997 (LSTM); Cho et al. 2014, arXiv 1406.1078 (GRU).
    """

    def __init__(self, num_inputs: int, config: AgentConfig, rngs: nnx.Rngs) -> None:
        size = config.memory_size
        self.cell: nnx.OptimizedLSTMCell | nnx.GRUCell
        # The second of the blocks of a bias belongs to the LSTM's forget gate, or to the GRU's update gate.
        if config.memory == "lstm":
            self.cell = nnx.OptimizedLSTMCell(num_inputs, size, bias_init=_ones_in_second_of(4), rngs=rngs)
        else:
            self.cell = nnx.GRUCell(num_inputs, size, bias_init=_ones_in_second_of(3), rngs=rngs)
        self.num_features = size
        self.carry_size = 2 * size if config.memory == "lstm" else size

    def initial_carry(self, num_lanes: int) -> Carry:
        """Returns the state at the start of an episode, `[lanes, carry_size]` float32."""
        return jnp.zeros((num_lanes, self.carry_size))

    def step(self, carry: Carry, x: jax.Array, is_first: jax.Array) -> tuple[Carry, jax.Array]:
        """Returns the state after one observation of each lane, and the features that come of it.

        Args:
          carry: `[lanes, carry_size]`.
          x: `[lanes, inputs]`.
          is_first: `[lanes]` bool, whether the observation starts an episode. The state is reset before it.

        Returns:
          The state, and `[lanes, num_features]`.
        """
        carry = jnp.where(is_first[:, None], 0.0, carry)
        if isinstance(self.cell, nnx.GRUCell):
            return self.cell(carry, x)
        cell, hidden = jnp.split(carry, 2, axis=-1)
        (cell, hidden), x = self.cell((cell, hidden), x)
        return jnp.concatenate([cell, hidden], axis=-1), x

    def unroll(self, carry: Carry, x: jax.Array, is_first: jax.Array) -> tuple[Carry, jax.Array]:
        """Returns what `step` does row by row: `x` is `[rows, lanes, inputs]`, `is_first` `[rows, lanes]`."""
        return lax.scan(lambda carry, row: self.step(carry, *row), carry, (x, is_first))


def _ones_in_second_of(num_blocks: int) -> nnx.Initializer:
    """Returns an initialiser of vectors of equal blocks: ones in the second, zeros in the others."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        del key
        return jnp.zeros((num_blocks, shape[0] // num_blocks), dtype).at[1].set(1).reshape(shape)

    return init
