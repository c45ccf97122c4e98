"""The records that pass between the parts of an agent."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qfleet.core.keys import Draws

Params = Any  # a pytree of arrays
Carry = jax.Array  # `[lanes, size]` float32: what a recurrent network remembers of each lane


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """Shapes and limits of one environment (one lane)."""

    name: str
    observation_shape: tuple[int, ...]
    """Shape of one observation. If `frame_stack` is above 1, it is one frame, to which stacking adds a last axis."""
    observation_dtype: np.dtype
    """Type in which the replay stores observations. Networks cast them to float32, and divide uint8 by 255."""
    num_actions: int
    """Actions are the integers 0 to num_actions - 1."""
    frame_stack: int = 1
    """Number of newest frames that the agent sees at once, oldest first along the last axis. 1 adds no axis."""
    time_limit: int | None = None
    """Environment steps after which an episode is truncated, or None."""
    pixel_limit: float | None = None
    """Largest value of a pixel, by which networks divide, if observations are images that aren't uint8. With it,
    observations of two axes count as images too. None divides by nothing."""
    has_action_mask: bool = False
    """Whether only some actions are valid in some states. Lanes then join each observation with its mask, see
    `qfleet.core.masks`."""

    @property
    def lane_shape(self) -> tuple[int, ...]:
        """Shape of what a lane returns: an observation, or its values and the mask behind them in one vector."""
        if not self.has_action_mask:
            return self.observation_shape
        return (math.prod(self.observation_shape) + self.num_actions,)

    @property
    def agent_observation_shape(self) -> tuple[int, ...]:
        """Shape of an observation as the agent sees it, with frames stacked along a last axis."""
        return self.observation_shape if self.frame_stack == 1 else (*self.observation_shape, self.frame_stack)


def identity(obs: jax.Array) -> jax.Array:
    """Returns the observation itself: the storage layout of networks that want no other."""
    return obs


class Recurrence(NamedTuple):
    """How a network remembers, as pure functions. Outputs are those of `Network.outputs`.

    The state of a lane is reset before each observation that starts an episode.
    """

    initial: Callable[[int], Carry]
    """`initial(num_lanes) -> carry`, the state at the start of an episode: zeros, `[lanes, size]` float32."""
    step: Callable[[Params, Carry, jax.Array, jax.Array, Draws | None], tuple[Carry, Any]]
    """`step(params, carry, observations, is_first, draws) -> carry, outputs` takes one observation of each lane.
    Observations are `[lanes, ...]`, and `is_first`, `[lanes]` bool, says which of them start an episode."""
    unroll: Callable[[Params, Carry, jax.Array, jax.Array, Draws | None], tuple[Carry, Any]]
    """`unroll(params, carry, observations, is_first, draws) -> carry, outputs` takes many: the same as `step` row by
    row, faster. Observations and outputs are `[rows, lanes, ...]`, and `is_first` is `[rows, lanes]`. All rows of a
    lane share its key of noise; quantile fractions are drawn anew for each row."""
    q_values: Callable[[Any], jax.Array] = identity
    """`q_values(outputs) -> q`, from the outputs of one row to `[lanes, num_actions]` float32."""


class Network(NamedTuple):
    """A Q-network as pure functions. `qfleet.networks.from_nnx` makes one from a Flax NNX module."""

    init: Callable[[jax.Array], Params]
    """`init(key) -> params`."""
    apply: Callable[[Params, jax.Array], jax.Array]
    """`apply(params, observations) -> q_values`, from `[batch, ...]` to `[batch, num_actions]` float32. They are the
    means if the network learns distributions or draws noise."""
    to_storage_layout: Callable[[jax.Array], jax.Array] = identity
    """`to_storage_layout(obs) -> obs`, from `[..., *observation_shape]` to `[..., *stored_shape]`: the layout in which
    the agent and its replay keep each observation, or each frame of a stack. `apply` takes observations in this layout,
    with frames stacked along a last axis."""
    partition: Mapping[tuple[str, ...], tuple[str | None, ...]] = {}
    """How a module wants its parameters divided over a mesh: the mesh axis of each of their axes, by path. Other
    parameters are divided by `qfleet.networks.partition`'s own rule."""
    with_activations: Callable[[Params, jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]] | None = None
    """`with_activations(params, observations) -> q_values, activations` also returns the output of each hidden layer,
    `[batch, ..., units]`. Evaluations call it in place of `apply`; None leaves units unmeasured."""
    outputs: Callable[[Params, jax.Array, Draws | None], Any] | None = None
    """`outputs(params, observations, draws) -> outputs` returns what the agent's head learns from; see
    `qfleet.core.heads`. Without `draws` there is no noise, and quantile fractions are evenly spaced. None if the
    outputs are the Q-values."""
    recurrence: Recurrence | None = None
    """How the network remembers, or None if it doesn't. The other functions of a network that does take each
    observation for the first of an episode."""
    is_masked: bool = False
    """Whether it takes observations joined with action masks; `qfleet.core.masks.masked` makes such a network."""


def stored_spec(spec: EnvSpec, to_storage_layout: Callable[[jax.Array], jax.Array]) -> EnvSpec:
    """Returns `spec` with the shape and the type of observations after a network's `to_storage_layout`.

    Masks are a part of stored observations.
    """
    obs = jax.eval_shape(to_storage_layout, jax.ShapeDtypeStruct(spec.lane_shape, spec.observation_dtype))
    return dataclasses.replace(spec, observation_shape=obs.shape, observation_dtype=obs.dtype, has_action_mask=False)


class Transition(NamedTuple):
    """A batch of transitions of n steps or fewer. Every field has a leading axis `[batch]`.

    Termination, truncation and n-step returns are resolved when the batch is assembled. Targets and losses see only
    these fields.
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
    """`[batch, ...]`, the observation k steps later. It is the final one if the episode was truncated on the way."""
    weight: jax.Array
    """`[batch]` float32, the importance weight of each transition's loss."""


class Regression(NamedTuple):
    """A batch whose targets are known already, as in Q(lambda). Every field has a leading axis `[batch]`."""

    obs: jax.Array
    """`[batch, ...]`."""
    action: jax.Array
    """`[batch]` int32."""
    target: jax.Array
    """`[batch]` float32, the target of `q(obs)[action]`."""
    weight: jax.Array
    """`[batch]` float32, 0 for rows without an action and 1 for all others."""
    carry: Any = ()
    """With a recurrent network the leading axes are `[rows, lanes]`, and this is what the network remembered before the
    first row, `[lanes, size]` float32."""
    is_first: Any = ()
    """`[rows, lanes]` bool, with a recurrent network: whether an episode starts at a row. It is False for the first
    row, whose `carry` is known."""
    reward: Any = ()
    """`[batch]` float32, the reward of each row's step; `()` unless rewards are normalised."""
    discount: Any = ()
    """`[batch]` float32, the discount after it, or 0 if it terminated the episode; `()` as for `reward`."""


class Sequences(NamedTuple):
    """A batch of sequences: consecutive rows of one lane each. Every field has a leading axis `[batch]`.

    First come the rows that only bring the memory up to date (the burn-in), then those that are learned from, then
    `n_step` more to bootstrap from. A sequence may hold the end of an episode and the start of the next. Returns are
    resolved when the batch is assembled, as in `Transition`.
    """

    obs: jax.Array
    """`[batch, rows, ...]`, where the number of rows is `burn_in + sequence_length + n_step`."""
    is_first: jax.Array
    """`[batch, rows]` bool, whether an episode starts at a row. It is False for the first row, whose state is known."""
    carry: jax.Array
    """`[batch, size]` float32, what the actor's network remembered before the first row."""
    action: jax.Array
    """`[batch, sequence_length]` int32, from the first learned row on, as are the fields below."""
    reward: jax.Array
    """`[batch, sequence_length]` float32, sum of the k <= n rewards, each discounted to its row."""
    discount: jax.Array
    """`[batch, sequence_length]` float32, discount**k, or 0 if the episode terminated on the way."""
    num_steps: jax.Array
    """`[batch, sequence_length]` int32, k, the number of rows to the one to bootstrap from."""
    is_step: jax.Array
    """`[batch, sequence_length]` bool, whether the row holds a step. Nothing is learned from a row without one."""
    weight: jax.Array
    """`[batch]` float32, the importance weight of each sequence's loss."""


Batch = Transition | Regression | Sequences


def count_params(params: Params) -> int:
    """Returns how many numbers a tree of arrays, or of their shapes, has."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
