"""Measures flashbax's prioritised buffer for `benchmarks/replay.py`, which runs this in the peers' interpreter.

The buffer is the one that flashbax documents for DQN (`make_prioritised_flat_buffer`), with one row of `add_batch_size`
lanes per insertion. Every function is jitted and every state donated, as in flashbax's quickstart.
"""

import json
from typing import Any

import flashbax
import jax
import jax.numpy as jnp
from replay import BATCH_SIZE, DISCOUNT, IMPORTANCE_EXPONENT, LANES, PRIORITY_EXPONENT, Buffer, Step, measure


def make_flashbax_buffer(slots: int) -> Buffer:
    """Returns flashbax's prioritised flat buffer."""
    buffer = flashbax.make_prioritised_flat_buffer(
        max_length=slots,
        min_length=BATCH_SIZE,
        sample_batch_size=BATCH_SIZE,
        add_batch_size=LANES,
        priority_exponent=PRIORITY_EXPONENT,
        device=jax.default_backend(),
    )

    def init() -> Any:
        return buffer.init(Step(jnp.zeros(4), jnp.int32(0), jnp.float32(0), jnp.array(False)))

    def transition(sample: Any) -> tuple[jax.Array, ...]:
        first, second = sample.experience.first, sample.experience.second
        discount = jnp.where(first.terminated, 0.0, DISCOUNT)
        weight = (slots * sample.probabilities) ** -IMPORTANCE_EXPONENT
        return first.obs, first.action, first.reward, discount, second.obs, weight

    return Buffer(
        init=init,
        insert=buffer.add,
        sample=buffer.sample,
        set_priorities=lambda state, sample, error: buffer.set_priorities(state, sample.indices, jnp.abs(error) + 1e-6),
        transition=transition,
    )


for result in measure(make_flashbax_buffer):
    print(json.dumps(result), flush=True)
    input()  # waits until it is this buffer's turn again
