"""Heads, which map features to action values, and the whole Q-network."""

import jax
from flax import nnx

from qfleet.config import AgentConfig
from qfleet.core.types import EnvSpec
from qfleet.networks.torsos import Hidden, Seen, Torso


class Dense(nnx.Module):
    """A sequence of hidden dense layers, from `[batch, inputs]` to `[batch, num_features]`."""

    def __init__(self, num_inputs: int, sizes: tuple[int, ...], layer_norm: bool, rngs: nnx.Rngs) -> None:
        self.layers: nnx.List[Hidden] = nnx.List([])
        self.num_features = num_inputs
        for size in sizes:
            linear = nnx.Linear(self.num_features, size, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            self.layers.append(Hidden(linear, size, layer_norm))
            self.num_features = size

    def __call__(self, x: jax.Array, seen: Seen = None) -> jax.Array:
        for layer in self.layers:
            x = layer(x, seen)
        return x


class DuelingHead(nnx.Module):
    """One stream for the state's value and one for the actions' advantages.

    It maps `[batch, inputs]` to `[batch, num_actions]`. The mean advantage is subtracted, so that the part that all
    actions have in common is in the value.

    Source: Wang et al. 2016, arXiv 1511.06581, equation 9.
    """

    def __init__(
        self, num_inputs: int, stream_sizes: tuple[int, ...], num_actions: int, layer_norm: bool, rngs: nnx.Rngs
    ) -> None:
        self.value_hidden = Dense(num_inputs, stream_sizes, layer_norm, rngs)
        self.value = nnx.Linear(self.value_hidden.num_features, 1, rngs=rngs)
        self.advantage_hidden = Dense(num_inputs, stream_sizes, layer_norm, rngs)
        self.advantage = nnx.Linear(self.advantage_hidden.num_features, num_actions, rngs=rngs)

    def __call__(self, x: jax.Array, seen: Seen = None) -> jax.Array:
        value = self.value(self.value_hidden(x, seen))
        advantage = self.advantage(self.advantage_hidden(x, seen))
        return value + advantage - advantage.mean(-1, keepdims=True)


class QNetwork(nnx.Module):
    """A torso, hidden dense layers and a head.

    It maps observations, as the replay stores them, to `[batch, num_actions]` float32. With dueling, each stream has a
    layer of its own of the last of `hidden_sizes` (Wang et al. 2016), and the other layers are shared. Hidden layers
    start with He's initialisation for ReLU (Gaussian, variance 2 / inputs), the linear last layer with LeCun's
    (variance 1 / inputs), and biases with 0.

    Raises:
      ConfigError: if the torso doesn't suit the observations.
    """

    def __init__(self, spec: EnvSpec, config: AgentConfig, rngs: nnx.Rngs) -> None:
        sizes = config.hidden_sizes
        shared_sizes, stream_sizes = (sizes[:-1], sizes[-1:]) if config.dueling else (sizes, ())
        self.torso = Torso(spec, config, rngs)
        self.hidden = Dense(self.torso.num_features, shared_sizes, config.layer_norm, rngs)
        self.head: DuelingHead | nnx.Linear
        if config.dueling:
            self.head = DuelingHead(self.hidden.num_features, stream_sizes, spec.num_actions, config.layer_norm, rngs)
        else:
            self.head = nnx.Linear(self.hidden.num_features, spec.num_actions, rngs=rngs)

    def __call__(self, observations: jax.Array, seen: Seen = None) -> jax.Array:
        x = self.hidden(self.torso(observations, seen), seen)
        return self.head(x, seen) if isinstance(self.head, DuelingHead) else self.head(x)

    def with_activations(self, observations: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the Q-values, and the output of each hidden layer, `[batch, ..., units]`."""
        seen: list[jax.Array] = []
        return self(observations, seen), tuple(seen)
