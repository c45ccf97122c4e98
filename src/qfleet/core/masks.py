"""Action masks: which actions are valid in a state, as a part of what is observed there.

An environment with masks hands on each observation as one vector: the observation's values, then the mask, 1 for each
valid action. So a mask goes wherever its observation goes, such as the lanes, the replay, an evaluation, another
process, and no topology knows of masks. `masked` makes the agent's network: it takes such vectors, shows the network
the observation alone, and the Q-values of invalid actions become `INVALID`. Whoever compares Q-values honours masks by
that: greedy actions, targets, lambda-returns, an actor's priorities.

In a state without a valid action, such as one that ended its episode, all actions count as valid: its value is never
used, but it must be a number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.keys import Draws
from qfleet.core.types import Carry, EnvSpec, Network, Params, Recurrence, identity, stored_spec

INVALID = float(np.finfo(np.float32).min)
"""The Q-value of an invalid action. A finite one, so that a product with 0 is 0."""

_LEAST_VALID, _GREATEST_INVALID = -1e29, -1e30
"""Limits that tell valid actions from others, even if all values are multiplied by a scale."""


class MaskedOutputs(NamedTuple):
    """What a network with masks returns to its head."""

    outputs: Any
    """The outputs of the network itself."""
    is_valid: Array
    """`[batch, num_actions]` bool."""


def join(obs: Any, mask: Any, num_axes: int) -> Any:
    """Returns observations with their masks behind them, `[..., values + num_actions]`, in the observations' dtype.

    Args:
      obs: `[..., *shape]`, in NumPy or JAX.
      mask: `[..., num_actions]`, of the same library; 0 and 1 or bool.
      num_axes: length of `shape`.
    """
    numpy = np if isinstance(obs, np.ndarray) else jnp
    flat = obs.reshape(*obs.shape[: obs.ndim - num_axes], -1)
    return numpy.concatenate([flat, mask.astype(obs.dtype)], axis=-1)


def split(joined: Any, shape: tuple[int, ...], num_actions: int) -> tuple[Any, Any]:
    """Returns the observations, `[..., *shape]`, and masks, `[..., num_actions]` bool, that `join` has joined."""
    obs = joined[..., : joined.shape[-1] - num_actions].reshape(*joined.shape[:-1], *shape)
    return obs, joined[..., joined.shape[-1] - num_actions :] != 0


def split_lanes(joined: Any, spec: EnvSpec) -> tuple[Any, Any]:
    """Returns what `split` does of lanes' observations; of an environment without masks, them and True everywhere."""
    if spec.has_action_mask:
        return split(joined, spec.observation_shape, spec.num_actions)
    batch = joined.shape[: joined.ndim - len(spec.observation_shape)]
    return joined, np.ones((*batch, spec.num_actions), bool)


def nth_valid(is_valid: Any, n: Any) -> Any:
    """Returns the n-th valid action, counted from 0: `[..., num_actions]` bool and `[...]` int to `[...]` int32.

    It is a valid one for every n from 0 to the number of valid actions, excluded.
    """
    return (is_valid.astype(np.int32).cumsum(axis=-1) > n[..., None]).argmax(axis=-1).astype(np.int32)


def random_valid(is_valid: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Returns the valid action, `[...]` int32, that a random whole number picks; any action if none is valid."""
    is_valid = or_all(is_valid)
    action: np.ndarray = nth_valid(is_valid, number % is_valid.sum(axis=-1))
    return action


def or_all(mask: Any) -> Any:
    """Returns masks in which all actions are valid where none was."""
    return mask | ~mask.any(axis=-1, keepdims=True)


def with_invalid(q: Array, is_valid: Array) -> Array:
    """Returns Q-values, `[..., num_actions]`, that are `INVALID` where an action is, and far above it elsewhere."""
    return jnp.where(is_valid, jnp.maximum(q, _LEAST_VALID), INVALID)


def is_valid_in(q: Array) -> Array:
    """Returns which actions are valid by the Q-values of `with_invalid`. Those that aren't numbers are."""
    return ~(q < _GREATEST_INVALID)


def valid_or_greedy(action: Array, q: Array) -> Array:
    """Returns actions, `[...]` int32, with the best one in place of each that `q`, `[..., num_actions]`, forbids."""
    is_valid = jnp.take_along_axis(is_valid_in(q), action[..., None], axis=-1)[..., 0]
    return jnp.where(is_valid, action, jnp.argmax(q, axis=-1).astype(action.dtype))


def shown(q: np.ndarray) -> np.ndarray:
    """Returns Q-values as users see them, in a new array: -inf where an action is invalid."""
    return np.where(q < _GREATEST_INVALID, -np.inf, q).astype(np.float32)


def masked(network: Network, spec: EnvSpec) -> Network:
    """Returns a network that takes observations joined with masks, if the environment has masks; else the same one.

    Args:
      network: takes observations without masks.
      spec: of the environment.
    """
    if not spec.has_action_mask:
        return network
    num_actions, frame_stack = spec.num_actions, spec.frame_stack
    to_storage_layout = network.to_storage_layout
    shape = stored_spec(dataclasses.replace(spec, has_action_mask=False), to_storage_layout).observation_shape

    def seen(view: Array) -> tuple[Array, Array]:
        """Returns what the network sees, and the mask of the newest frame."""
        if frame_stack == 1:
            obs, mask = split(view, shape, num_actions)
            return obs, or_all(mask)
        frames, masks = split(jnp.moveaxis(view, -1, -2), shape, num_actions)  # [..., frames, *shape]
        return jnp.moveaxis(frames, view.ndim - 2, -1), or_all(masks[..., -1, :])

    def apply(params: Params, view: Array) -> Array:
        obs, is_valid = seen(view)
        return with_invalid(network.apply(params, obs), is_valid)

    def joined_to_storage_layout(joined: Array) -> Array:
        obs, mask = split(joined, spec.observation_shape, num_actions)
        return join(to_storage_layout(obs), mask, len(shape))

    def with_activations(params: Params, view: Array) -> tuple[Array, tuple[Array, ...]]:
        assert network.with_activations is not None
        obs, is_valid = seen(view)
        q, activations = network.with_activations(params, obs)
        return with_invalid(q, is_valid), activations

    def outputs(params: Params, view: Array, draws: Draws | None) -> MaskedOutputs:
        obs, is_valid = seen(view)
        inner: Callable[..., Any] = network.outputs or (lambda params, obs, draws: network.apply(params, obs))
        return MaskedOutputs(inner(params, obs, draws), is_valid)

    def masked_recurrence(inner: Recurrence) -> Recurrence:
        return Recurrence(
            inner.initial,
            of_rows(inner.step),
            of_rows(inner.unroll),
            lambda outputs: with_invalid(inner.q_values(outputs.outputs), outputs.is_valid),
        )

    def of_rows(function: Callable[..., tuple[Carry, Any]]) -> Callable[..., tuple[Carry, MaskedOutputs]]:
        def masked_rows(
            params: Params, carry: Carry, view: Array, is_first: Array, draws: Draws | None
        ) -> tuple[Carry, MaskedOutputs]:
            obs, is_valid = seen(view)
            carry, outputs = function(params, carry, obs, is_first, draws)
            return carry, MaskedOutputs(outputs, is_valid)

        return masked_rows

    return network._replace(
        recurrence=network.recurrence and masked_recurrence(network.recurrence),
        apply=apply,
        to_storage_layout=identity if to_storage_layout is identity else joined_to_storage_layout,
        with_activations=network.with_activations and with_activations,
        outputs=outputs,
        is_masked=True,
    )
