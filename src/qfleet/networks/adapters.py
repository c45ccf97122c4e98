"""Q-networks as pairs of pure functions, made from configuration or from a user's Flax NNX module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.heads import make_head
from qfleet.core.keys import Draws, key_shape
from qfleet.core.types import EnvSpec, Network, Params, Recurrence, identity, stored_spec
from qfleet.networks.heads import QNetwork, RecurrentQNetwork
from qfleet.networks.torsos import make_storage_layout


def make_network(spec: EnvSpec, config: AgentConfig) -> Network:
    """Returns the built-in Q-network for these observations and actions.

    Raises:
      ConfigError: if the torso doesn't suit the observations.
    """
    kind = QNetwork if config.memory == "none" else RecurrentQNetwork
    return from_nnx(lambda rngs: kind(spec, config, rngs))._replace(to_storage_layout=make_storage_layout(spec, config))


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Returns the module's forward pass as pure functions of its parameters.

    Args:
      make_module: builds the module, and draws its initial parameters from the random streams that it is given. The
        module maps `[batch, ...]` observations, as the replay stores them (uint8 not yet divided by 255, stacked frames
        along the last axis), to `[batch, num_actions]`.

        If it has a method `with_activations(observations)`, which returns the action values and a tuple of the outputs
        of its hidden layers, `[batch, ..., units]`, evaluations measure how many units are never active.

        A module that learns distributions, or draws noise, has a method `outputs(observations, draws)` too, as
        `Network.outputs` describes. One that remembers has `initial_carry(num_lanes)`, `step(carry, observations,
        is_first, draws)` and `unroll`, with the same arguments, as `Recurrence` describes; if its outputs aren't the
        action values, it also has `q_values(outputs)`.

    Returns:
      A network whose parameters are nested dicts of arrays. Their keys are the attribute names of the module, and for
      elements of lists the index as a string. Both functions can be jitted, differentiated and vmapped.
    Raises:
      ConfigError: if the module holds state other than parameters, which a pure function of parameters can't keep.
    """
    with nnx.use_eager_sharding(False):  # the mesh of a run places the arrays later
        abstract_module = nnx.eval_shape(lambda: make_module(nnx.Rngs(0)))
    graphdef, abstract_params, rest = nnx.split(abstract_module, nnx.Param, ...)  # type: ignore[misc]
    others = [f"{'.'.join(map(str, path))} ({type(leaf).__name__})" for path, leaf in nnx.to_flat_state(rest)]
    if others:
        raise ConfigError(
            f"a network's state must be nnx.Param only, got {', '.join(others)}; replace layers that change or draw "
            "random numbers while they run (batch normalisation, dropout), for example by layer normalisation, "
            "make arrays that should be learned nnx.Param, and compute constants in __call__"
        )
    partition = {
        tuple(map(str, path)): tuple(axes)
        for path, variable in nnx.to_flat_state(abstract_params)
        if (axes := variable.get_metadata().get("out_sharding")) is not None
    }
    paths = {tuple(map(str, path)): path for path, _ in nnx.to_flat_state(abstract_params)}

    def init(key: jax.Array) -> Params:
        with nnx.use_eager_sharding(False):
            params = nnx.state(make_module(nnx.Rngs(key)), nnx.Param)
        return unflatten_dict(
            {tuple(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(params)}
        )

    def module_of(params: Params) -> Any:
        leaves = {paths[names]: value for names, value in flatten_dict(params).items()}
        return nnx.merge(graphdef, nnx.from_flat_state(leaves))

    def apply(params: Params, observations: jax.Array) -> jax.Array:
        return module_of(params)(observations)

    def with_activations(params: Params, observations: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return module_of(params).with_activations(observations)

    def outputs(params: Params, observations: jax.Array, draws: Draws | None) -> Any:
        return module_of(params).outputs(observations, draws)

    return Network(
        init,
        apply,
        partition=partition,
        with_activations=with_activations if hasattr(abstract_module, "with_activations") else None,
        outputs=outputs if hasattr(abstract_module, "outputs") else None,
        recurrence=_recurrence(abstract_module, module_of) if hasattr(abstract_module, "unroll") else None,
    )


def _recurrence(abstract_module: Any, module_of: Callable[[Params], Any]) -> Recurrence:
    return Recurrence(
        initial=abstract_module.initial_carry,
        step=lambda params, *inputs: module_of(params).step(*inputs),
        unroll=lambda params, *inputs: module_of(params).unroll(*inputs),
        q_values=getattr(abstract_module, "q_values", identity),
    )


_SCALAR = AgentConfig()


def check_network(network: Network, spec: EnvSpec, config: AgentConfig = _SCALAR) -> int:
    """Checks, without computing anything, that `network` maps observations of `spec` to float32 action values.

    If the agent's head isn't scalar, or its layers are noisy, the network must have `outputs` that suit them.

    Returns:
      The number of its parameters.
    Raises:
      ConfigError: if it isn't a `Network`, can't be traced with such observations, or returns another shape or type.
    """
    if not isinstance(network, Network):
        raise ConfigError(
            f"`network` must be a qfleet.Network, got a {type(network).__name__}; convert a Flax NNX module by "
            f"qfleet.from_nnx(lambda rngs: ...)"
        )
    batch = 3  # a number that is hardly the size of anything else in the network
    # It is shown observations without masks.
    stored = stored_spec(dataclasses.replace(spec, has_action_mask=False), network.to_storage_layout)
    observations = jax.ShapeDtypeStruct((batch, *stored.agent_observation_shape), stored.observation_dtype)
    seen = f"observations {observations.dtype}{list(observations.shape)} of {spec.name}"
    wanted = f"float32{[batch, spec.num_actions]}"
    try:
        params = jax.eval_shape(network.init, key_shape())
        q_values = jax.eval_shape(network.apply, params, observations)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a network must map {seen} to action values {wanted}, got {type(error).__name__}: {error}; fit its "
            "first layer to the observations (uint8 isn't divided by 255 yet, stacked frames are the last axis)"
        ) from error
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", q_values)
    if shapes != wanted:
        raise ConfigError(
            f"a network must map {seen} to action values {wanted}, got {shapes}; fit its last layer to the "
            f"{spec.num_actions} actions, and let it return float32"
        )
    _check_outputs(network, config, params, observations, spec.num_actions)
    _check_recurrence(network, config, params, observations, spec.num_actions)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_outputs(
    network: Network, config: AgentConfig, params: Params, observations: jax.ShapeDtypeStruct, num_actions: int
) -> None:
    """Raises ConfigError unless the network returns what the agent's head takes."""
    if config.head == "scalar" and not config.noisy:
        return
    setting = "noisy layers" if config.head == "scalar" else f"head {config.head}"
    remedy = "give its module a method outputs(observations, draws), see qfleet.Network, or leave the setting out"
    if network.outputs is None:
        raise ConfigError(f"a network of your own must have outputs to learn with {setting}, got none; {remedy}")
    head, wanted = make_head(config), (observations.shape[0], num_actions)
    try:
        outputs = jax.eval_shape(network.outputs, params, observations, None)
        num_outputs = None if head.num_outputs is None else outputs.shape[-1]
        fits = num_outputs == head.num_outputs and jax.eval_shape(head.q_values, outputs).shape == wanted
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the outputs of a network must suit {setting}, got {type(error).__name__}: {error}; {remedy}"
        ) from error
    if not fits:
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", outputs)
        axes = [*wanted, *([] if head.num_outputs is None else [head.num_outputs])]
        raise ConfigError(f"the outputs of a network must be float32{axes} with {setting}, got {shapes}; {remedy}")


def _check_recurrence(
    network: Network, config: AgentConfig, params: Params, observations: jax.ShapeDtypeStruct, num_actions: int
) -> None:
    """Raises ConfigError unless the network remembers if, and only if, the agent does."""
    recurrence = network.recurrence
    if config.memory == "none":
        if recurrence is not None:
            raise ConfigError("memory must be lstm or gru for a network with a recurrence, got none; choose either")
        return
    remedy = "give its module initial_carry, step and unroll, see qfleet.Network, or leave memory out"
    if recurrence is None:
        raise ConfigError(
            f"a network of your own must have a recurrence to learn with memory {config.memory}, got none; {remedy}"
        )
    rows, lanes = 5, observations.shape[0]
    q_values_of = make_head(config).q_values

    def shapes_of(function: Callable[..., Any], *leading: int) -> Any:
        obs = jax.ShapeDtypeStruct((*leading, *observations.shape[1:]), observations.dtype)
        is_first = jax.ShapeDtypeStruct(leading, bool)
        new_carry, outputs = jax.eval_shape(function, params, carry, obs, is_first, None)
        values_of = q_values_of if len(leading) == 1 else jax.vmap(q_values_of)
        return jax.tree.map(
            lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", (new_carry, jax.eval_shape(values_of, outputs))
        )

    try:
        carry = jax.eval_shape(lambda: recurrence.initial(lanes))
        size = f"float32{[lanes, carry.shape[-1]]}"
        found = shapes_of(recurrence.step, lanes), shapes_of(recurrence.unroll, rows, lanes)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the recurrence of a network must suit its observations, got {type(error).__name__}: {error}; {remedy}"
        ) from error
    wanted = (size, f"float32{[lanes, num_actions]}"), (size, f"float32{[rows, lanes, num_actions]}")
    if found != wanted:
        raise ConfigError(
            f"step and unroll of a recurrence must return the state and outputs of action values {wanted}, got "
            f"{found}; {remedy}"
        )
