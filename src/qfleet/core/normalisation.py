"""Normalisation of observations and rewards by running statistics.

The statistics are part of an agent's parameters, `{"network": ..., "statistics": ...}`. So they go where parameters go:
into the target network, to actors, servers and peers, and into checkpoints. Evaluations and policies use them as they
are. Where a learner step has gradients, the statistics have *moments* of the batch: means of functions of its samples.
So the mean of the moments of several replicas is that of the whole batch, and one learner step moves the statistics in
the same way wherever it is taken. Samples count by their importance weights, which correct for prioritised sampling.

Statistics of one kind are a dict of float32 arrays:

- `known`, `[]`: 1 once a first batch has given `mean` a value to count from, and 0 before;
- `mean` and `variance`, `[*features]`: over all samples of all later batches;
- `weight`, `[]`: the sum of the mean weights of these batches, so with weights of 1 their number.

Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for joining variances; Mnih et al.
2015 and OpenAI's baselines (`VecNormalize`) for scaling by running statistics and clipping at 10 deviations.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.heads import SampleLosses
from qfleet.core.keys import Draws
from qfleet.core.types import EnvSpec, Network, Params, Regression, Transition, stored_spec

NETWORK, STATISTICS = "network", "statistics"
"""Keys of the parameters of an agent that normalises. In the order of their leaves, statistics come last."""

MAX_DEVIATIONS = 10.0
"""Largest magnitude of a normalised observation."""

_TINY = 1e-30

Statistics = dict[str, Any]


class StatisticsPlace(NamedTuple):
    """Where the statistics are among the parameters of a learner, which may be a tree or a vector."""

    take: Callable[[Params], dict[str, Statistics]]
    """`take(params) -> statistics`."""
    replace: Callable[[Params, dict[str, Statistics]], Params]
    """`replace(params, statistics) -> params`."""


IN_TREE = StatisticsPlace(lambda params: params[STATISTICS], lambda params, value: {**params, STATISTICS: value})
"""The place of the statistics in the parameters of an agent that normalises."""

NOWHERE = StatisticsPlace(lambda params: {}, lambda params, value: params)
"""The place of the statistics in a piece of the parameters that holds none."""


def normalised(network: Network, spec: EnvSpec, config: AgentConfig) -> Network:
    """Returns a network that normalises as `config` says; the network itself if it doesn't.

    Its Q-values are in units of discounted reward. Its `outputs`, which learn, are in units of the reward's scale.
    """
    if not normalises(config):
        return network
    stored = stored_spec(dataclasses.replace(spec, has_action_mask=False), network.to_storage_layout)

    def init(key: Array) -> Params:
        found = (
            {"observation": init_statistics(stored.agent_observation_shape)} if config.normalise_observations else {}
        )
        if config.normalise_rewards:
            found["reward"] = init_statistics((2,))
        return {NETWORK: network.init(key), STATISTICS: found}

    def seen(params: Params, obs: Array) -> Array:
        return normalise(params[STATISTICS]["observation"], obs) if config.normalise_observations else obs

    def apply(params: Params, obs: Array) -> Array:
        return network.apply(params[NETWORK], seen(params, obs)) * value_scale(params, config)

    def with_activations(params: Params, obs: Array) -> tuple[Array, tuple[Array, ...]]:
        assert network.with_activations is not None
        q, activations = network.with_activations(params[NETWORK], seen(params, obs))
        return q * value_scale(params, config), activations

    def outputs(params: Params, obs: Array, draws: Draws | None) -> Any:
        if network.outputs is None:
            return network.apply(params[NETWORK], seen(params, obs))
        return network.outputs(params[NETWORK], seen(params, obs), draws)

    return network._replace(
        init=init,
        apply=apply,
        partition={(NETWORK, *path): axes for path, axes in network.partition.items()},
        with_activations=None if network.with_activations is None else with_activations,
        outputs=outputs,
    )


def normalises(config: AgentConfig) -> bool:
    """Returns whether an agent normalises anything, so that its parameters hold statistics."""
    return config.normalise_observations or config.normalise_rewards


def init_statistics(shape: tuple[int, ...]) -> Statistics:
    """Returns statistics of nothing, for features of this shape."""
    zero = jnp.zeros((), jnp.float32)
    return {"known": zero, "mean": jnp.zeros(shape), "variance": jnp.zeros(shape), "weight": zero}


def normalise(statistics: Statistics, obs: Array) -> Array:
    """Returns observations, `[batch, *features]` float32, with mean 0 and variance 1 by these statistics.

    They are 0 where nothing is known yet or the feature is constant, and at most `MAX_DEVIATIONS` in magnitude.
    """
    mean, variance = (jax.lax.stop_gradient(statistics[name]) for name in ("mean", "variance"))
    least = jnp.square(1e-6 * mean) + _TINY  # less is the rounding of float32
    scale = jnp.where(variance > least, jax.lax.rsqrt(jnp.maximum(variance, least)), 0.0)
    return jnp.clip((obs.astype(jnp.float32) - mean) * scale, -MAX_DEVIATIONS, MAX_DEVIATIONS)


def value_scale(params: Params, config: AgentConfig) -> Array | float:
    """Returns by what rewards are divided, `[]` float32: the size that a discounted return should have.

    A return goes on from a window of n steps with the mean discount d after it, which is 0 after a terminated episode.
    If windows have the mean reward m and the variance v, and don't depend on each other, the mean square of the return
    is about `(m / (1 - d))**2 + v / (1 - d**2)`. The scale is its root, or 1 while it isn't known or 0. It doesn't
    depend on what the network says.
    """
    if not config.normalise_rewards:
        return 1.0
    statistics = jax.lax.stop_gradient(params[STATISTICS]["reward"])
    mean, going_on = statistics["mean"][0], jnp.clip(statistics["mean"][1], 0.0, 1.0 - 1e-4)
    square = jnp.square(mean / (1.0 - going_on)) + statistics["variance"][0] / (1.0 - jnp.square(going_on))
    is_known = (statistics["weight"] > 0) & (square > _TINY)
    return jnp.where(is_known, jnp.sqrt(jnp.maximum(square, _TINY)), 1.0)


def to_scaled(
    batch: Transition | Regression, params: Params, target_params: Params, config: AgentConfig
) -> Transition | Regression:
    """Returns a batch in units of the online network's scale, into which the target network's values are converted."""
    if not config.normalise_rewards:
        return batch
    scale = value_scale(params, config)
    if isinstance(batch, Regression):
        return batch._replace(target=batch.target / scale)
    ratio = value_scale(target_params, config) / scale
    return batch._replace(reward=batch.reward / scale, discount=batch.discount * ratio)


def from_scaled(
    found: SampleLosses, params: Params, config: AgentConfig, *, priority_is_td_error: bool
) -> SampleLosses:
    """Returns TD errors, and priorities if these are TD errors, in units of discounted reward."""
    if not config.normalise_rewards:
        return found
    scale = value_scale(params, config)
    priority = found.priority * scale if priority_is_td_error else found.priority
    return found._replace(td_error=found.td_error * scale, priority=priority)


def _without_masks(obs: Array, shape: tuple[int, ...]) -> Array:
    """Returns observations, `[batch, *shape]`, without the action masks that may be joined behind them."""
    if obs.shape[1:] == shape:
        return obs
    return obs[:, : math.prod(shape)].reshape(len(obs), *shape)


def with_moments(grads: Params, params: Params, batch: Transition | Regression) -> Params:
    """Returns gradients with the moments of a batch, or of this replica's share, in the place of the statistics."""
    statistics = params[STATISTICS]
    found = {}
    if "observation" in statistics:
        obs = _without_masks(batch.obs, statistics["observation"]["mean"].shape)
        found["observation"] = moments(statistics["observation"], obs, batch.weight)
    if "reward" in statistics:
        features = jnp.stack([batch.reward, batch.discount], axis=-1)
        found["reward"] = moments(statistics["reward"], features, batch.weight)
    return {**grads, STATISTICS: found}


def moments(statistics: Statistics, features: Array, weight: Array) -> Statistics:
    """Returns means over a batch, in the structure of the statistics, that `moved` takes.

    Args:
      statistics: the statistics that the replica has.
      features: `[batch, *features]`.
      weight: `[batch]` float32.
    """
    distance = features.astype(jnp.float32) - statistics["mean"]
    of_sample = weight.reshape(-1, *(1,) * (features.ndim - 1))
    return {
        "known": (statistics["known"] > 0).astype(jnp.float32),
        "mean": jnp.mean(of_sample * distance, axis=0),
        "variance": jnp.mean(of_sample * jnp.square(distance), axis=0),
        "weight": jnp.mean(weight),
    }


def moved(statistics: Statistics, batch: Statistics) -> Statistics:
    """Returns statistics after one more batch, whose moments are given.

    The first batch only gives a mean, from which the others count: with the distance from 0, float32 would lose a
    variance that is small beside the mean. A gradient that a worker began before that is left out.
    """
    known, mean, variance, weight = (statistics[name] for name in ("known", "mean", "variance", "weight"))
    has_weight, is_first = batch["weight"] > 0, known == 0
    counts = has_weight & ~is_first & (batch["known"] > 0.999)
    total = weight + jnp.where(counts, batch["weight"], 0.0)
    rate = jnp.where(counts, batch["weight"] / jnp.maximum(total, _TINY), 0.0)
    divisor = jnp.where(has_weight, batch["weight"], 1.0)
    distance, square = batch["mean"] / divisor, batch["variance"] / divisor
    step = jnp.where(counts, rate * distance, 0.0)
    joined = (1.0 - rate) * variance + rate * jnp.where(counts, square, 0.0) - jnp.square(step)
    return {
        "known": jnp.where(has_weight, 1.0, known),
        "mean": jnp.where(is_first & has_weight, mean + distance, mean + step),
        "variance": jnp.maximum(joined, 0.0),
        "weight": total,
    }


def without_statistics(params: Params, place: StatisticsPlace | None) -> Params:
    """Returns parameters, or gradients, with zeros for the statistics: what the optimiser sees."""
    if place is None:
        return params
    return place.replace(params, jax.tree.map(jnp.zeros_like, place.take(params)))


def apply_updates(params: Params, updates: Params, grads: Params, place: StatisticsPlace | None) -> Params:
    """Returns parameters after an optimiser's updates, and statistics after the moments in `grads`."""
    new: Params = optax.apply_updates(params, updates)
    if place is None:
        return new
    statistics, batch = place.take(params), place.take(grads)
    return place.replace(new, {name: moved(statistics[name], batch[name]) for name in statistics})


def learned(params: Params) -> Params:
    """Returns parameters without statistics."""
    has_statistics = isinstance(params, dict) and params.keys() == {NETWORK, STATISTICS}
    return params[NETWORK] if has_statistics else params


def rewards_of_rollout(reward: Array, discount: Array, config: AgentConfig) -> dict[str, Array]:
    """Returns the fields of a `Regression` that the statistics of rewards need; none if there are none."""
    return {"reward": reward, "discount": discount} if config.normalise_rewards else {}
