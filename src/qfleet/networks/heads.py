"""Heads, which map features to outputs for each action, and the whole Q-network."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qfleet.config import AgentConfig
from qfleet.core.heads import Quantiles, make_head
from qfleet.core.keys import Draws, draws_of_rows
from qfleet.core.types import Carry, EnvSpec
from qfleet.networks.layers import ForwardPass, Hidden, NoisyLinear, activation_of, linear
from qfleet.networks.memory import MemoryCell
from qfleet.networks.torsos import Torso

_LAST_LAYER = nnx.initializers.lecun_normal()


def make_linear(
    num_inputs: int,
    num_units: int,
    config: AgentConfig,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer = _LAST_LAYER,
) -> nnx.Linear | NoisyLinear:
    """Returns a dense layer, which is noisy if `config` says so. Noisy layers have an initialisation of their own."""
    if config.noisy:
        return NoisyLinear(num_inputs, num_units, config.noisy_std, rngs)
    return nnx.Linear(num_inputs, num_units, kernel_init=kernel_init, rngs=rngs)


class Dense(nnx.Module):
    """A sequence of hidden dense layers, from `[batch, ..., inputs]` to `[batch, ..., num_features]`."""

    def __init__(self, num_inputs: int, sizes: tuple[int, ...], config: AgentConfig, rngs: nnx.Rngs) -> None:
        self.layers: nnx.List[Hidden] = nnx.List([])
        self.num_features = num_inputs
        for size in sizes:
            layer = make_linear(self.num_features, size, config, rngs, nnx.initializers.he_normal())
            self.layers.append(Hidden(layer, size, config.layer_norm, activation_of(config)))
            self.num_features = size

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        for layer in self.layers:
            x = layer(x, forward)
        return x


class DuelingHead(nnx.Module):
    """One stream for the state's value and one for the actions' advantages.

    It maps `[batch, ..., inputs]` to `[batch, ..., num_actions * num_outputs]`. The mean advantage is subtracted, so
    that the part that all actions have in common is in the value.

    Source: Wang et al. 2016, arXiv 1511.06581, equation 9; for distributions, Hessel et al. 2018, arXiv 1710.02298.
    """

    def __init__(
        self,
        num_inputs: int,
        stream_sizes: tuple[int, ...],
        num_actions: int,
        num_outputs: int,
        config: AgentConfig,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_actions = num_actions
        self.value_hidden = Dense(num_inputs, stream_sizes, config, rngs)
        self.value = make_linear(self.value_hidden.num_features, num_outputs, config, rngs)
        self.advantage_hidden = Dense(num_inputs, stream_sizes, config, rngs)
        num_units = num_actions * num_outputs
        self.advantage = make_linear(self.advantage_hidden.num_features, num_units, config, rngs)

    def __call__(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        value = linear(self.value, self.value_hidden(x, forward), forward)
        advantage = linear(self.advantage, self.advantage_hidden(x, forward), forward)
        if value.shape[-1] == 1:
            return value + advantage - advantage.mean(-1, keepdims=True)
        advantage = advantage.reshape(*advantage.shape[:-1], self.num_actions, -1)
        both = value[..., None, :] + advantage - advantage.mean(-2, keepdims=True)
        return both.reshape(*both.shape[:-2], -1)


class FractionEmbedding(nnx.Module):
    """Embeds quantile fractions: `[batch, fractions]` to `[batch, fractions, num_features]`.

    Source: Dabney et al. 2018, arXiv 1806.06923, equation 4.
    """

    def __init__(self, num_cosines: int, num_features: int, rngs: nnx.Rngs) -> None:
        self.num_cosines = num_cosines
        self.linear = nnx.Linear(num_cosines, num_features, kernel_init=nnx.initializers.he_normal(), rngs=rngs)

    def __call__(self, fraction: jax.Array) -> jax.Array:
        return jax.nn.relu(self.linear(jnp.cos(np.pi * np.arange(self.num_cosines) * fraction[..., None])))


class QNetwork(nnx.Module):
    """A torso, hidden dense layers, a recurrent cell if the network has a memory, and a head.

    It maps observations, as the replay stores them, to Q-values, `[batch, num_actions]` float32. `outputs` are what the
    agent's head takes instead: `[batch, num_actions, num_outputs]` or `Quantiles`, if it isn't scalar.

    With dueling, each stream has a layer of its own of the last of `hidden_sizes` (Wang et al. 2016), and the other
    layers are shared. Memory lies between the shared layers and the rest. Implicit quantiles multiply the features
    before that last layer by an embedding of each fraction. Hidden layers start with He's initialisation for ReLU
    (Gaussian, variance 2 / inputs), the linear last layer with LeCun's (variance 1 / inputs), and biases with 0.

    Raises:
      ConfigError: if the torso doesn't suit the observations.
    """

    def __init__(self, spec: EnvSpec, config: AgentConfig, rngs: nnx.Rngs) -> None:
        sizes, is_implicit = config.hidden_sizes, config.head == "iqn"
        is_divided = config.dueling or is_implicit
        shared_sizes, last_sizes = (sizes[:-1], sizes[-1:]) if is_divided else (sizes, ())
        agent_head = make_head(config)
        self.num_actions, self.num_outputs = spec.num_actions, agent_head.num_outputs
        self.q_values = agent_head.q_values
        self.num_quantiles, self.num_acting_quantiles = config.num_quantiles, config.num_acting_quantiles
        self.torso = Torso(spec, config, rngs)
        self.hidden = Dense(self.torso.num_features, shared_sizes, config, rngs)
        num_features, num_outputs = self.hidden.num_features, self.num_outputs or 1
        self.memory = MemoryCell(num_features, config, rngs) if config.memory != "none" else None
        if self.memory is not None:
            num_features = self.memory.num_features
        self.embedding = FractionEmbedding(config.num_cosines, num_features, rngs) if is_implicit else None
        self.last_hidden = Dense(num_features, last_sizes, config, rngs) if is_implicit and not config.dueling else None
        self.head: DuelingHead | nnx.Linear | NoisyLinear
        if config.dueling:
            self.head = DuelingHead(num_features, last_sizes, spec.num_actions, num_outputs, config, rngs)
        else:
            num_inputs = num_features if self.last_hidden is None else self.last_hidden.num_features
            self.head = make_linear(num_inputs, spec.num_actions * num_outputs, config, rngs)

    def __call__(self, observations: jax.Array) -> jax.Array:
        return self.q_values(self.outputs(observations, None))

    def with_activations(self, observations: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the Q-values, and the output of each hidden layer, `[batch, ..., units]`."""
        forward = ForwardPass(shows=True)
        return self.q_values(self._outputs(observations, forward)), tuple(forward.seen or ())

    def outputs(self, observations: jax.Array, draws: Draws | None) -> jax.Array | Quantiles:
        """Returns what the agent's head takes; see `Network.outputs`."""
        return self._outputs(observations, ForwardPass(draws))

    def _outputs(self, observations: jax.Array, forward: ForwardPass) -> jax.Array | Quantiles:
        x = self._features(observations, forward)
        if self.memory is not None:
            is_first = jnp.ones(x.shape[0], bool)
            _, x = self.memory.step(self.memory.initial_carry(x.shape[0]), x, is_first)
        return self._outputs_of(x, forward)

    def _features(self, observations: jax.Array, forward: ForwardPass) -> jax.Array:
        return self.hidden(self.torso(observations, forward), forward)

    def _outputs_of(self, x: jax.Array, forward: ForwardPass) -> jax.Array | Quantiles:
        if self.embedding is not None:
            fraction = self._fractions(x.shape[0], forward)
            values = self._last_layers(x[:, None, :] * self.embedding(fraction), forward)
            return Quantiles(jnp.moveaxis(values, 1, 2), fraction)
        x = self._last_layers(x, forward)
        return x if self.num_outputs is None else x.reshape(x.shape[0], self.num_actions, self.num_outputs)

    def _fractions(self, batch_size: int, forward: ForwardPass) -> jax.Array:
        """Returns random quantile fractions, or evenly spaced ones, `[batch, fractions]`."""
        if forward.draws is not None and forward.draws.samples is not None:
            return jax.vmap(lambda key: jax.random.uniform(key, (self.num_quantiles,)))(forward.draws.samples)
        evenly = (jnp.arange(self.num_acting_quantiles) + 0.5) / self.num_acting_quantiles
        return jnp.broadcast_to(evenly, (batch_size, self.num_acting_quantiles))

    def _last_layers(self, x: jax.Array, forward: ForwardPass) -> jax.Array:
        if self.last_hidden is not None:
            x = self.last_hidden(x, forward)
        return self.head(x, forward) if isinstance(self.head, DuelingHead) else linear(self.head, x, forward)


class RecurrentQNetwork(QNetwork):
    """A Q-network with a memory. The functions that it inherits take each observation for the first of an episode."""

    memory: MemoryCell

    def initial_carry(self, num_lanes: int) -> Carry:
        """Returns what the network remembers at the start of an episode; see `Recurrence`."""
        return self.memory.initial_carry(num_lanes)

    def step(
        self, carry: Carry, observations: jax.Array, is_first: jax.Array, draws: Draws | None
    ) -> tuple[Carry, jax.Array | Quantiles]:
        """Returns what the network remembers after one observation of each lane, and its outputs; see `Recurrence`."""
        forward = ForwardPass(draws)
        carry, x = self.memory.step(carry, self._features(observations, forward), is_first)
        return carry, self._outputs_of(x, forward)

    def unroll(
        self, carry: Carry, observations: jax.Array, is_first: jax.Array, draws: Draws | None
    ) -> tuple[Carry, jax.Array | Quantiles]:
        """Returns the same as `step` row by row. Only the memory is a loop: all other layers take all rows at once."""
        num_rows, num_lanes = is_first.shape
        forward = ForwardPass(None if draws is None else draws_of_rows(draws, num_rows))
        x = self._features(observations.reshape(-1, *observations.shape[2:]), forward)
        carry, x = self.memory.unroll(carry, x.reshape(num_rows, num_lanes, -1), is_first)
        outputs = self._outputs_of(x.reshape(num_rows * num_lanes, -1), forward)
        return carry, jax.tree.map(lambda leaf: leaf.reshape(num_rows, num_lanes, *leaf.shape[1:]), outputs)
