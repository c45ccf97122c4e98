"""A policy as one pure function of arrays, with its parameters inside, and what its inputs and outputs mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.core.exploration import greedy
from qfleet.core.frame_stack import stack_to_storage_layout
from qfleet.core.masks import is_valid_in, join
from qfleet.core.types import EnvSpec, Network, Params


class Port(NamedTuple):
    """One input or output. All of them have a leading axis `[batch]`, of any length."""

    name: str
    shape: tuple[int, ...]
    """Shape without the leading axis."""
    dtype: np.dtype
    meaning: str


class Program(NamedTuple):
    """A policy as a function of arrays."""

    function: Callable[..., tuple[Array, ...]]
    """Takes the inputs in their order, and returns the outputs in theirs."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def make_program(network: Network, params: Params, spec: EnvSpec) -> Program:
    """Returns the program of a greedy policy.

    It takes observations, then action masks if the environment has them, then the state and the starts of episodes if
    the network remembers. It returns actions, Q-values and the new state.

    Args:
      network: the network, which takes observations joined with masks if the environment has masks.
      params: its parameters.
      spec: of the environment.
    """
    recurrence = network.recurrence

    def view_of(obs: Array, mask: Array | None) -> Array:
        seen = obs if mask is None else _join_view(obs, mask, spec)
        return stack_to_storage_layout(network.to_storage_layout, seen, spec.frame_stack)

    def outputs_of(q: Array) -> tuple[Array, ...]:
        shown = jnp.where(is_valid_in(q), q, -jnp.inf) if spec.has_action_mask else q
        return greedy(q), shown

    def function(obs: Array, *more: Array) -> tuple[Array, ...]:
        mask, more = (more[0], more[1:]) if spec.has_action_mask else (None, more)
        view = view_of(obs, mask)
        if recurrence is None:
            return outputs_of(network.apply(params, view))
        state, is_first = more
        state, outputs = recurrence.step(params, state, view, is_first, None)
        return (*outputs_of(recurrence.q_values(outputs)), state)

    shape = None if recurrence is None else recurrence.initial(1).shape[1:]
    return Program(function, (*_observed(spec), *_remembered(shape)), (*_decided(spec), *_to_remember(shape)))


def random_input(port: Port, batch_size: int, random: np.random.Generator) -> np.ndarray:
    """Returns random values for an input: normal numbers, bytes or flags. The first action is always valid."""
    shape = (batch_size, *port.shape)
    if np.issubdtype(port.dtype, np.floating):
        return random.normal(size=shape).astype(port.dtype)
    values = random.integers(256 if port.dtype == np.uint8 else 2, size=shape).astype(port.dtype)
    if port.name == "action_mask":
        values[:, 0] = True
    return values


def _observed(spec: EnvSpec) -> tuple[Port, ...]:
    frames = "" if spec.frame_stack == 1 else f"; the newest {spec.frame_stack} frames, oldest first, on the last axis"
    ports = [Port("observation", spec.agent_observation_shape, spec.observation_dtype, f"what the agent sees{frames}")]
    if spec.has_action_mask:
        meaning = "whether each action is valid now"
        ports.append(Port("action_mask", (spec.num_actions,), np.dtype(bool), meaning))
    return tuple(ports)


def _decided(spec: EnvSpec) -> tuple[Port, ...]:
    invalid = "; -inf for an invalid action" if spec.has_action_mask else ""
    return (
        Port("action", (), np.dtype(np.int32), "the action with the greatest Q-value, from 0"),
        Port("q_values", (spec.num_actions,), np.dtype(np.float32), f"the Q-value of each action{invalid}"),
    )


def _remembered(shape: tuple[int, ...] | None) -> tuple[Port, ...]:
    if shape is None:
        return ()
    state = "what the network remembers of the episode: zeros at first, then `new_state` of the step before"
    is_first = "whether the observation starts an episode, so that the state counts as zeros"
    return Port("state", shape, np.dtype(np.float32), state), Port("is_first", (), np.dtype(bool), is_first)


def _to_remember(shape: tuple[int, ...] | None) -> tuple[Port, ...]:
    meaning = "what the network remembers from now on"
    return () if shape is None else (Port("new_state", shape, np.dtype(np.float32), meaning),)


def _join_view(obs: Array, mask: Array, spec: EnvSpec) -> Array:
    """Returns observations joined with masks, `[batch, values + num_actions]`, and an axis of frames if there is one.

    Only the newest frame's mask counts, so each frame gets it.
    """
    if spec.frame_stack == 1:
        return join(obs, mask, len(spec.observation_shape))
    masks: Any = jnp.broadcast_to(mask[:, None, :], (mask.shape[0], spec.frame_stack, spec.num_actions))
    joined = join(jnp.moveaxis(obs, -1, 1), masks, len(spec.observation_shape))
    return jnp.moveaxis(joined, 1, -1)
