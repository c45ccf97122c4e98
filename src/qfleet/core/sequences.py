"""The loss of sequences: the network remembers from the stored state on, as it did when the sequence was recorded.

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning", sections 2.3, 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.heads import Head, Outputs, SampleLosses, Values
from qfleet.core.keys import Draws
from qfleet.core.types import Params, Recurrence, Sequences, Transition

TargetOf = Callable[[Transition, Outputs, Outputs, Outputs], Values]
"""`target_of(batch, outputs_tm1, outputs, chooser) -> target`: the target network's outputs where each action was taken
and after it, and the outputs of the network that chooses the action after it. `batch` needs no observations."""

_NOTHING: Any = ()

SequenceLoss = Callable[[Params, Params, Sequences, Draws | None, Draws | None], SampleLosses]
"""`loss(params, target_params, batch, draws, target_draws) -> of_sequences`, `[batch]` each."""


def make_sequence_loss(recurrence: Recurrence, head: Head, config: AgentConfig, target_of: TargetOf) -> SequenceLoss:
    """Returns the loss of sequences.

    The loss and the TD error of a sequence are means over its learned rows that hold a step. Its priority is
    `priority_max_share` of the greatest absolute priority of these rows, and the rest of their mean. The online network
    is unrolled once: if its layers are noisy, it chooses with the noise that it learns with.

    Args:
      recurrence: how the network remembers.
      head: what its outputs mean.
      config: lengths, and how priorities are mixed.
      target_of: the target of transitions.
    """
    burn_in, num_learned = config.burn_in, config.sequence_length

    def unrolled(params: Params, batch: Sequences, draws: Draws | None) -> Outputs:
        """Returns the outputs of the rows after the burn-in, `[rows, batch, ...]`."""
        obs, is_first = jnp.moveaxis(batch.obs, 1, 0), batch.is_first.T
        carry = batch.carry
        if burn_in:
            carry, _ = recurrence.unroll(params, carry, obs[:burn_in], is_first[:burn_in], draws)
            carry = jax.lax.stop_gradient(carry)
        return recurrence.unroll(params, carry, obs[burn_in:], is_first[burn_in:], draws)[1]

    def loss(
        params: Params, target_params: Params, batch: Sequences, draws: Draws | None, target_draws: Draws | None
    ) -> SampleLosses:
        online, target = unrolled(params, batch, draws), unrolled(target_params, batch, target_draws)
        next_row = jnp.arange(num_learned)[:, None] + batch.num_steps.T
        action, reward, discount, weight = (
            _flat(x.T) for x in (batch.action, batch.reward, batch.discount, batch.is_step)
        )
        rows = Transition(_NOTHING, action, reward, discount, _NOTHING, weight)
        of_target = target_of(
            rows,
            _learned(target, num_learned),
            _at_rows(target, next_row),
            jax.lax.stop_gradient(_at_rows(online, next_row)),
        )
        found = head.loss(_learned(online, num_learned), rows.action, jax.lax.stop_gradient(of_target))
        return _over_rows(found, batch.is_step.T, config.priority_max_share)

    return loss


def _over_rows(found: SampleLosses, is_step: Array, max_share: float) -> SampleLosses:
    """Returns the losses of sequences, `[batch]`, from those of rows, `[rows * batch]`; `is_step`: `[rows, batch]`."""
    num_steps = jnp.maximum(jnp.sum(is_step, axis=0), 1)

    def of_steps(x: Array) -> Array:
        return jnp.where(is_step, x.reshape(is_step.shape), 0.0)

    def mean(x: Array) -> Array:
        return jnp.sum(of_steps(x), axis=0) / num_steps

    priority = jnp.abs(found.priority)
    greatest = jnp.max(of_steps(priority), axis=0)
    return SampleLosses(
        loss=mean(found.loss),
        td_error=mean(jnp.abs(found.td_error)),
        priority=max_share * greatest + (1.0 - max_share) * mean(priority),
    )


def _learned(outputs: Outputs, num_learned: int) -> Outputs:
    return jax.tree.map(lambda x: _flat(x[:num_learned]), outputs)


def _at_rows(outputs: Outputs, rows: Array) -> Outputs:
    """Returns the outputs at these rows of each sequence, `[learned rows * batch, ...]`; `rows` is `[rows, batch]`."""

    def take(x: Array) -> Array:
        flat = rows * x.shape[1] + jnp.arange(x.shape[1])
        return _flat(x).at[_flat(flat)].get(mode="promise_in_bounds")

    return jax.tree.map(take, outputs)


def _flat(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])
