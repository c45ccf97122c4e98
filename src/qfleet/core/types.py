"""The records that pass between the parts of an agent."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Params = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """Shapes and limits of one environment (one lane)."""

    name: str
    observation_shape: tuple[int, ...]
    """Of one observation; with `frame_stack` above 1, of one frame, to which stacking adds a last axis."""
    observation_dtype: np.dtype
    """What the replay stores; networks cast to float32 (and divide uint8 by 255)."""
    num_actions: int
    """Actions are the integers 0 to num_actions - 1."""
    frame_stack: int = 1
    """Newest frames the agent sees at once, oldest first along the last axis; 1 adds no axis."""
    time_limit: int | None = None
    """Environment steps after which an episode is truncated, or None."""

    @property
    def agent_observation_shape(self) -> tuple[int, ...]:
        """Shape of what the agent sees: frames stacked along a last axis."""
        return self.observation_shape if self.frame_stack == 1 else (*self.observation_shape, self.frame_stack)


def identity(obs: jax.Array) -> jax.Array:
    """Returns the observation itself: how it is kept where a network has no wish of its own."""
    return obs


class Network(NamedTuple):
    """A Q-network as pure functions; Flax NNX modules become one by `qfleet.networks.from_nnx`."""

    init: Callable[[jax.Array], Params]
    """`init(key) -> params`."""
    apply: Callable[[Params, jax.Array], jax.Array]
    """`apply(params, observations) -> q_values`: `[batch, ...]` to `[batch, num_actions]` float32."""
    to_storage_layout: Callable[[jax.Array], jax.Array] = identity
    """`to_storage_layout(obs) -> obs`, `[..., *observation_shape]` to `[..., *stored_shape]`: how the agent and its replay keep
    each observation, or each frame of a stack. `apply` sees these, frames stacked along a last axis."""
    partition: Mapping[tuple[str, ...], tuple[str | None, ...]] = {}
    """How parameters are to be divided over a mesh, where a module says so: by path, the mesh axis of each of their
    axes."""


def stored_spec(spec: EnvSpec, to_storage_layout: Callable[[jax.Array], jax.Array]) -> EnvSpec:
    """Returns the spec of observations as a network's `to_storage_layout` keeps them."""
    obs = jax.eval_shape(to_storage_layout, jax.ShapeDtypeStruct(spec.observation_shape, spec.observation_dtype))
    return dataclasses.replace(spec, observation_shape=obs.shape, observation_dtype=obs.dtype)


class Transition(NamedTuple):
    """A batch of transitions, n steps long or shorter. Leading axis `[batch]` everywhere.

    Termination, truncation and n-step returns are settled when the batch is assembled: targets and losses see
    these fields only.
    """

    obs: jax.Array
    """`[batch, ...]`, the observation acted on at time t-1."""
    action: jax.Array
    """`[batch]` int32, the action taken there."""
    reward: jax.Array
    """`[batch]` float32, sum of the k <= n rewards, each discounted to time t-1."""
    discount: jax.Array
    """`[batch]` float32, discount**k, or 0 if the episode terminated on the way."""
    next_obs: jax.Array
    """`[batch, ...]`, the observation k steps later: the final one if the episode was truncated on the way."""
    weight: jax.Array
    """`[batch]` float32, importance weight of each transition's loss."""


class Regression(NamedTuple):
    """A batch whose targets are known already, as Q(lambda) computes them. Leading axis `[batch]` everywhere."""

    obs: jax.Array
    """`[batch, ...]`."""
    action: jax.Array
    """`[batch]` int32."""
    target: jax.Array
    """`[batch]` float32, what `q(obs)[action]` should be."""
    weight: jax.Array
    """`[batch]` float32: 0 for rows without an action, else 1."""


Batch = Transition | Regression
