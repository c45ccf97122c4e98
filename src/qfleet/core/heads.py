"""Heads: what a network's outputs mean, and the loss that teaches it a distribution of returns, or their mean.

A network's outputs for a batch are one tree. A head reads three things off it: the Q-values, the distribution of the
return after an action, and how far the distribution of an action is from a target. No other code knows what the outputs
are. A distribution, or a target, is a weighted set of values (`Values`); a scalar is a set of one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig, ConfigError
from qfleet.config.own_parts import make_own_part
from qfleet.config.values import show
from qfleet.core.losses import huber_loss, make_loss
from qfleet.core.masks import MaskedOutputs, with_invalid
from qfleet.core.rescaling import rescale, unscale
from qfleet.core.targets import take_action

Outputs = Any
"""What a network returns: Q-values `[batch, num_actions]`, logits or quantiles `[batch, num_actions, outputs]`, or
`Quantiles`."""


class Values(NamedTuple):
    """A distribution of returns for each sample of a batch: values in units of discounted reward, with weights."""

    value: Array
    """`[batch, values]` float."""
    weight: Array
    """`[batch, values]` float, which adds up to 1 over the values."""

    @property
    def mean(self) -> Array:
        """The expected return, `[batch]`."""
        return jnp.sum(self.value * self.weight, axis=-1)


class Quantiles(NamedTuple):
    """The outputs of a network with implicit quantiles: values of its own fractions."""

    value: Array
    """`[batch, num_actions, fractions]` float, the quantile function of the return at these fractions."""
    fraction: Array
    """`[batch, fractions]` float in [0, 1]."""


class SampleLosses(NamedTuple):
    """How far the values of a batch are from their targets. `[batch]` float each."""

    loss: Array
    """Without importance weights."""
    td_error: Array
    """Mean target minus Q-value, in units of discounted reward: for metrics."""
    priority: Array
    """For the replay, which takes its absolute value."""


class Head(NamedTuple):
    """The pure functions of one head. Outputs are those of a network, for a batch."""

    num_outputs: int | None
    """Numbers that the network returns for each action; None if it is one: the Q-value, or that of a fraction."""
    q_values: Callable[[Outputs], Array]
    """`q_values(outputs) -> q`, `[batch, num_actions]`."""
    values_of: Callable[[Outputs, Array], Values]
    """`values_of(outputs, action) -> values`, the distribution of the return after an action, `[batch]` int."""
    mixture: Callable[[Outputs, Array, Array], Values]
    """`mixture(outputs, policy, bonus) -> values`: the distribution of the return plus bonus of an action that is drawn
    from `policy`. Both are `[batch, num_actions]` float."""
    loss: Callable[[Outputs, Array, Values], SampleLosses]
    """`loss(outputs, action, target) -> loss`, of the value of `action`, `[batch]` int. The caller keeps gradients from
    `target`."""
    priority_is_td_error: bool = True
    """Whether priorities are TD errors, so that an actor that knows Q-values can compute them."""
    is_valid: Callable[[Outputs], Array | None] = lambda outputs: None
    """`is_valid(outputs) -> is_valid`, which actions are valid, `[batch, num_actions]` bool; None if all are."""


def masked_head(head: Head) -> Head:
    """Returns the head of a network that `qfleet.core.masks.masked` returns. Invalid actions get no weight."""

    def mixture(masked: MaskedOutputs, policy: Array, bonus: Array) -> Values:
        # The log-probability of an invalid action isn't that of anything, so its bonus may not be finite.
        policy, bonus = (jnp.where(masked.is_valid, each, 0.0) for each in (policy, bonus))
        return head.mixture(masked.outputs, policy, bonus)

    return head._replace(
        q_values=lambda masked: with_invalid(head.q_values(masked.outputs), masked.is_valid),
        values_of=lambda masked, action: head.values_of(masked.outputs, action),
        mixture=mixture,
        loss=lambda masked, action, target: head.loss(masked.outputs, action, target),
        is_valid=lambda masked: masked.is_valid,
    )


def point_values(value: Array) -> Values:
    """Returns distributions that have all of their weight at one value, `[batch]`."""
    return Values(value[:, None], jnp.ones_like(value[:, None]))


def backed_up(reward: Array, discount: Array, values: Values, *, is_rescaled: bool = False) -> Values:
    """Returns the distribution of `reward + discount * value`; reward and discount are `[batch]`.

    With `is_rescaled`, values before and after are rescaled: `h(reward + discount * h**-1(value))` (Pohlen et al. 2018,
    arXiv 1805.11593, section 3.2).
    """
    if is_rescaled:
        return Values(rescale(reward[:, None] + discount[:, None] * unscale(values.value)), values.weight)
    return Values(reward[:, None] + discount[:, None] * values.value, values.weight)


def make_head(config: AgentConfig) -> Head:
    """Returns the head that `config` names.

    Raises:
      ConfigError: if it is a user's, and their function can't be imported or doesn't return a head.
    """
    match config.head:
        case "scalar":
            return scalar_head(make_loss(config))
        case "c51":
            return categorical_head(support(config))
        case "hl_gauss":
            atoms = support(config)
            return hl_gauss_head(atoms, config.hl_gauss_smoothing * float(atoms[1] - atoms[0]))
        case "qr":
            return quantile_head(config.num_quantiles, config.huber_delta)
        case "iqn":
            return implicit_quantile_head(config.huber_delta)
        case name:
            return _own_head(name, config)


def _own_head(name: str, config: AgentConfig) -> Head:
    head = make_own_part("head", name, config)
    num_outputs = head.num_outputs if isinstance(head, Head) else 0
    if not (num_outputs is None or (isinstance(num_outputs, int) and num_outputs > 0)):
        raise ConfigError(
            f"head must name a function that returns a qfleet.core.heads.Head with a positive num_outputs or None, got "
            f"{name}, which returned {show(head)}; build one, as in scalar_head(loss)"
        )
    return head


def support(config: AgentConfig) -> np.ndarray:
    """Returns the atoms of a categorical distribution, `[num_atoms]` float32, evenly spaced."""
    return np.linspace(config.value_min, config.value_max, config.num_atoms, dtype=np.float32)


def scalar_head(elementwise_loss: Callable[[Array], Array]) -> Head:
    """Returns the head of networks that return Q-values, with a loss of the TD error (Mnih et al. 2015)."""

    def loss(q: Array, action: Array, target: Values) -> SampleLosses:
        td_error = target.mean - take_action(q, action)
        return SampleLosses(elementwise_loss(td_error), td_error, td_error)

    return Head(None, lambda q: q, _scalar_values_of, _scalar_mixture, loss)


def _scalar_values_of(q: Array, action: Array) -> Values:
    return point_values(take_action(q, action))


def _scalar_mixture(q: Array, policy: Array, bonus: Array) -> Values:
    return point_values(jnp.sum(policy * (q + bonus), axis=-1))


def categorical_head(atoms: np.ndarray) -> Head:
    """Returns the head of networks that return a logit for each atom of a distribution of returns.

    The priority is the Kullback-Leibler divergence, as in Rainbow (Hessel et al. 2018, arXiv 1710.02298).

    Args:
      atoms: `[num_atoms]`, evenly spaced.

    Source: Bellemare et al. 2017, arXiv 1707.06887, algorithm 1.
    """

    def values_of(logits: Array, action: Array) -> Values:
        weight = jax.nn.softmax(_of_action(logits, action))
        return Values(jnp.broadcast_to(jnp.asarray(atoms), weight.shape), weight)

    def mixture(logits: Array, policy: Array, bonus: Array) -> Values:
        weight = policy[..., None] * jax.nn.softmax(logits)
        value = jnp.asarray(atoms) + bonus[..., None]
        return Values(value.reshape(len(value), -1), weight.reshape(len(weight), -1))

    def loss(logits: Array, action: Array, target: Values) -> SampleLosses:
        return _cross_entropy(atoms, _of_action(logits, action), project(target, atoms), target.mean, of_kl=True)

    def q_values(logits: Array) -> Array:
        return _mean(logits, atoms)

    return Head(len(atoms), q_values, values_of, mixture, loss, priority_is_td_error=False)


def _mean(logits: Array, atoms: np.ndarray) -> Array:
    """Returns the mean of each categorical distribution: `[..., num_atoms]` to `[...]`."""
    return jax.nn.softmax(logits) @ atoms


def project(values: Values, atoms: np.ndarray) -> Array:
    """Returns the probabilities of atoms, `[batch, num_atoms]`, that have the mean of `values` within the atoms' range.

    Each value gives its weight to the two atoms next to it, the nearer one more. Values beyond the range are moved to
    its ends.

    Source: Bellemare et al. 2017, arXiv 1707.06887, equation 7.
    """
    value = jnp.clip(values.value, atoms[0], atoms[-1])
    distance = jnp.abs(value[:, None, :] - atoms[:, None]) / (atoms[1] - atoms[0])
    return jnp.sum(jnp.clip(1.0 - distance, 0.0, 1.0) * values.weight[:, None, :], axis=-1)


def hl_gauss_head(atoms: np.ndarray, sigma: float) -> Head:
    """Returns the head that learns a mean by classification: the target is a histogram of a Gaussian around it.

    Args:
      atoms: `[num_atoms]`, the centres of the histogram's bins, evenly spaced.
      sigma: standard deviation of the Gaussian, in units of discounted reward.

    Source: Farebrother et al. 2024, arXiv 2403.03950, section 3.1.
    """

    def q_values(logits: Array) -> Array:
        return _mean(logits, atoms)

    def values_of(logits: Array, action: Array) -> Values:
        return _scalar_values_of(q_values(logits), action)

    def mixture(logits: Array, policy: Array, bonus: Array) -> Values:
        return _scalar_mixture(q_values(logits), policy, bonus)

    def loss(logits: Array, action: Array, target: Values) -> SampleLosses:
        mean = target.mean
        return _cross_entropy(atoms, _of_action(logits, action), gauss_histogram(mean, atoms, sigma), mean, of_kl=False)

    return Head(len(atoms), q_values, values_of, mixture, loss)


def gauss_histogram(mean: Array, atoms: np.ndarray, sigma: float) -> Array:
    """Returns the share of a Gaussian in the bin around each atom, `[batch, num_atoms]`, within the range of all bins.

    Args:
      mean: `[batch]`; moved to the nearest atom if it is beyond all of them.
      atoms: `[num_atoms]`.
      sigma: standard deviation.
    """
    width = atoms[1] - atoms[0]
    edges = np.append(atoms - width / 2, atoms[-1] + width / 2)
    mean = jnp.clip(mean, atoms[0], atoms[-1])
    below = jax.scipy.special.erf((edges - mean[:, None]) / (np.sqrt(2.0) * sigma))
    return (below[:, 1:] - below[:, :-1]) / (below[:, -1:] - below[:, :1])


def _cross_entropy(atoms: np.ndarray, logits: Array, target: Array, target_mean: Array, *, of_kl: bool) -> SampleLosses:
    loss = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
    td_error = jax.lax.stop_gradient(target_mean - _mean(logits, atoms))
    entropy = -jnp.sum(jax.scipy.special.xlogy(target, target), axis=-1)
    return SampleLosses(loss, td_error, jax.lax.stop_gradient(loss - entropy) if of_kl else td_error)


def quantile_head(num_quantiles: int, huber_delta: float) -> Head:
    """Returns the head of networks that return fixed quantiles of the return.

    Args:
      num_quantiles: number of quantiles, in the middle of equal shares of the probability.
      huber_delta: `kappa` of the loss, in units of discounted reward.

    Source: Dabney et al. 2018, arXiv 1710.10044, equation 10 and algorithm 1.
    """
    fractions = (np.arange(num_quantiles, dtype=np.float32) + 0.5) / num_quantiles

    def loss(quantiles: Array, action: Array, target: Values) -> SampleLosses:
        return _quantile_loss(_of_action(quantiles, action), fractions, target, huber_delta)

    return Head(
        num_quantiles, lambda x: jnp.mean(x, axis=-1), _quantiles_of, _quantile_mixture, loss,
        priority_is_td_error=False,
    )  # fmt: skip


def implicit_quantile_head(huber_delta: float) -> Head:
    """Returns the head of networks that return quantiles at fractions of their own.

    Args:
      huber_delta: `kappa` of the loss, in units of discounted reward.

    Source: Dabney et al. 2018, arXiv 1806.06923, equations 3 and 4.
    """

    def loss(outputs: Quantiles, action: Array, target: Values) -> SampleLosses:
        return _quantile_loss(_of_action(outputs.value, action), outputs.fraction, target, huber_delta)

    return Head(
        None, lambda outputs: jnp.mean(outputs.value, axis=-1),
        lambda outputs, action: _quantiles_of(outputs.value, action),
        lambda outputs, policy, bonus: _quantile_mixture(outputs.value, policy, bonus),
        loss,
        priority_is_td_error=False,
    )  # fmt: skip


def _quantiles_of(quantiles: Array, action: Array) -> Values:
    value = _of_action(quantiles, action)
    return Values(value, jnp.full_like(value, 1 / value.shape[-1]))


def _quantile_mixture(quantiles: Array, policy: Array, bonus: Array) -> Values:
    # The average is over actions at the same fraction, as in Munchausen-IQN (Vieillard et al. 2020, appendix B.1).
    value = jnp.einsum("ba,baq->bq", policy, quantiles + bonus[..., None])
    return Values(value, jnp.full_like(value, 1 / value.shape[-1]))


def _quantile_loss(quantiles: Array, fractions: Array | np.ndarray, target: Values, huber_delta: float) -> SampleLosses:
    """Returns the quantile Huber loss, added up over `quantiles`, `[batch, fractions]`, and averaged over the target.

    It is divided by kappa, as for implicit quantiles, so that it becomes the quantile loss as kappa goes to 0.

    The priority is the loss, as in the prioritised IQN of Toromanoff et al. 2019, arXiv 1908.04683.
    """
    error = target.value[:, None, :] - quantiles[:, :, None]  # [batch, fractions, values]
    slope = jnp.abs(jnp.asarray(fractions)[..., None] - (jax.lax.stop_gradient(error) < 0))
    losses = slope * huber_loss(error, huber_delta) / huber_delta
    loss = jnp.sum(jnp.sum(losses * target.weight[:, None, :], axis=-1), axis=-1)
    td_error = jax.lax.stop_gradient(target.mean - jnp.mean(quantiles, axis=-1))
    return SampleLosses(loss, td_error, jax.lax.stop_gradient(loss))


def _of_action(outputs: Array, action: Array) -> Array:
    """Returns the outputs for one action, `[batch, outputs]`. The gradient is a product: a scatter is slow on a CPU."""
    return jnp.einsum("ba,bao->bo", jax.nn.one_hot(action, outputs.shape[1], dtype=outputs.dtype), outputs)
