"""The loss of a batch: builds targets from both networks' outputs, and measures the online network's error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.heads import Head, Outputs, SampleLosses, Values, backed_up, point_values
from qfleet.core.keys import Draws
from qfleet.core.normalisation import from_scaled, to_scaled
from qfleet.core.own_targets import NetworkOutputs, Target, make_own_target
from qfleet.core.sequences import make_sequence_loss
from qfleet.core.targets import munchausen_bonus, soft_policy
from qfleet.core.types import Batch, Network, Params, Regression, Sequences, Transition

Loss = Callable[..., tuple[Array, SampleLosses]]
"""`loss(params, target_params, batch, draws=None) -> loss, of_samples`; the loss is `[]`, the weighted mean."""

OutputsOf = Callable[[Params, Array, Draws | None], Outputs]
"""`outputs_of(params, obs, draws) -> outputs`, as `Network.outputs`."""


class _LossDraws(NamedTuple):
    """What each of the networks that a loss asks draws from."""

    value: Draws | None = None
    """For the values that learn."""
    target: Draws | None = None
    """For the target network's values of what comes next."""
    other: Draws | None = None
    """For the online network, which chooses what comes next, or the target network, which rates what was done."""


def make_loss(network: Network, outputs_of: OutputsOf, head: Head, config: AgentConfig) -> Loss:
    """Returns the loss of transitions, of sequences, or of known targets, whichever a batch holds.

    Args:
      network: the Q-network.
      outputs_of: its outputs.
      head: what they mean.
      config: the agent's config.
    """
    target_of = _make_target(outputs_of, head, config)
    recurrence = network.recurrence
    loss_of_sequences = recurrence and make_sequence_loss(recurrence, head, config, _make_target_of_rows(head, config))

    def loss(
        params: Params, target_params: Params, batch: Batch, draws: Draws | None = None
    ) -> tuple[Array, SampleLosses]:
        split = _split(draws)
        if isinstance(batch, Sequences):
            assert loss_of_sequences is not None
            found = loss_of_sequences(params, target_params, batch, split.value, split.target)
            return jnp.mean(batch.weight * found.loss), found
        if isinstance(batch, Regression) and recurrence is not None:
            _, rows = recurrence.unroll(params, batch.carry, batch.obs, batch.is_first, split.value)
            batch = batch._replace(carry=(), is_first=())
            outputs, flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rows, batch))
        else:
            outputs, flat = outputs_of(params, batch.obs, split.value), batch
        flat = to_scaled(flat, params, target_params, config)
        target = jax.lax.stop_gradient(target_of(params, target_params, flat, split))
        found = head.loss(outputs, flat.action, target)
        loss = jnp.mean(flat.weight * found.loss)
        return loss, from_scaled(found, params, config, priority_is_td_error=head.priority_is_td_error)

    return loss


def _split(draws: Draws | None) -> _LossDraws:
    if draws is None:
        return _LossDraws()
    noise = jax.random.split(draws.noise, 3)
    samples = None if draws.samples is None else jax.vmap(jax.random.split, (0, None), 1)(draws.samples, 3)
    return _LossDraws(*(Draws(noise[i], None if samples is None else samples[i]) for i in range(3)))


def _make_target(
    outputs_of: OutputsOf, head: Head, config: AgentConfig
) -> Callable[[Params, Params, Transition | Regression, _LossDraws], Values]:
    """Returns the target of a batch: it asks no network for outputs that the agent's target doesn't use."""
    own_target: Target | None = make_own_target(config)

    def target_of(params: Params, target_params: Params, batch: Transition | Regression, draws: _LossDraws) -> Values:
        if isinstance(batch, Regression):
            return point_values(batch.target)
        if own_target is not None:
            outputs = NetworkOutputs(
                online_tm1=outputs_of(params, batch.obs, draws.value),
                target_tm1=outputs_of(target_params, batch.obs, draws.other),
                online_t=outputs_of(params, batch.next_obs, draws.other),
                target_t=outputs_of(target_params, batch.next_obs, draws.target),
            )
            return own_target(head, batch, outputs)
        if config.munchausen:
            outputs_tm1 = outputs_of(target_params, batch.obs, draws.other)
            outputs_t = outputs_of(target_params, batch.next_obs, draws.target)
            return _munchausen_target(head, config, batch, outputs_tm1, outputs_t)
        outputs_t = outputs_of(target_params, batch.next_obs, draws.target)
        chooser = outputs_of(params, batch.next_obs, draws.other) if config.double else outputs_t
        return _greedy_target(head, config, batch, outputs_t, chooser)

    return target_of


def _make_target_of_rows(head: Head, config: AgentConfig) -> Callable[[Transition, Outputs, Outputs, Outputs], Values]:
    """Returns the target of the rows of sequences, whose outputs are known: see `qfleet.core.sequences`."""

    def target_of(batch: Transition, outputs_tm1: Outputs, outputs_t: Outputs, chooser: Outputs) -> Values:
        if config.munchausen:
            return _munchausen_target(head, config, batch, outputs_tm1, outputs_t)
        return _greedy_target(head, config, batch, outputs_t, chooser if config.double else outputs_t)

    return target_of


def _greedy_target(head: Head, config: AgentConfig, batch: Transition, outputs_t: Outputs, chooser: Outputs) -> Values:
    next_values = head.values_of(outputs_t, jnp.argmax(head.q_values(chooser), axis=-1))
    return backed_up(batch.reward, batch.discount, next_values, is_rescaled=config.value_rescaling)


def _munchausen_target(
    head: Head, config: AgentConfig, batch: Transition, outputs_tm1: Outputs, outputs_t: Outputs
) -> Values:
    temperature = config.munchausen_temperature

    def log_policy_of(outputs: Outputs) -> Array:
        return soft_policy(head.q_values(outputs), temperature, head.is_valid(outputs))

    bonus = munchausen_bonus(
        log_policy_of(outputs_tm1), batch.action, temperature, config.munchausen_weight, config.munchausen_clip
    )
    log_policy = log_policy_of(outputs_t)
    next_values = head.mixture(outputs_t, jnp.exp(log_policy), -temperature * log_policy)
    return backed_up(batch.reward + bonus, batch.discount, next_values)
