"""Q-networks as pairs of pure functions, made from configuration or from a user's Flax NNX module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from qfleet.config import AgentConfig, ConfigError
from qfleet.config.errors import RAISED_BY_USERS, short
from qfleet.config.own_parts import make_own_part
from qfleet.core.heads import make_head
from qfleet.core.keys import Draws, key_shape
from qfleet.core.normalisation import normalised, normalises
from qfleet.core.types import EnvSpec, Network, Params, Recurrence, identity, stored_spec
from qfleet.networks.heads import QNetwork, RecurrentQNetwork
from qfleet.networks.torsos import choose_torso, make_storage_layout


def make_network(spec: EnvSpec, config: AgentConfig, given: Network | None = None) -> Network:
    """Returns the Q-network for these observations and actions, which normalises as `config` says.

    It is the one that is `given`, the user's that `config` names, or the built-in one.

    Raises:
      ConfigError: if the torso doesn't suit the observations, the user's function doesn't return a network, or
        observations can't be normalised.
    """
    network = make_plain_network(spec, config) if given is None else _checked(given)
    if normalises(config):
        _check_can_be_normalised(network, spec, config, is_own=given is not None or config.network is not None)
    return normalised(network, spec, config)


def _check_can_be_normalised(network: Network, spec: EnvSpec, config: AgentConfig, *, is_own: bool) -> None:
    if network.recurrence is not None:
        raise ConfigError(
            f"normalise_observations and normalise_rewards must be left out with a network that remembers, got one for "
            f"{spec.name}; leave them out, or choose memory none"
        )
    what = None
    if not config.normalise_observations:
        return
    if spec.has_action_mask and spec.frame_stack > 1:
        what = "are stacked frames with action masks"
    elif spec.observation_dtype == np.bool_:
        what = "are flags, which have one size"
    elif spec.observation_dtype == np.uint8 or (not is_own and choose_torso(spec, config.torso) != "mlp"):
        what = "are images, whose pixels the network divides by their limit"
    if what is not None:
        shape = f"{spec.observation_dtype}{list(spec.observation_shape)}"
        raise ConfigError(
            f"normalise_observations must be left out where observations {what}, got {shape} of {spec.name}; leave it "
            f"out"
        )


def make_plain_network(spec: EnvSpec, config: AgentConfig) -> Network:
    """Returns the network that `config` names or describes, as it is without normalisation."""
    if config.network is not None:
        network: Network = make_own_part("network", config.network, spec, config)
        if not isinstance(network, Network):
            raise ConfigError(
                f"network must name a function that returns a qfleet.Network, got {config.network}, which returned a "
                f"{type(network).__name__}; convert a Flax NNX module by qfleet.from_nnx(lambda rngs: ...)"
            )
        return network
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
    _checked(network)
    # It is shown observations without masks.
    stored = stored_spec(dataclasses.replace(spec, has_action_mask=False), network.to_storage_layout)
    batches = [  # of sizes that hardly anything else in the network has
        jax.ShapeDtypeStruct((size, *stored.agent_observation_shape), stored.observation_dtype) for size in (3, 5)
    ]
    params: Any = None
    for observations in batches:
        seen = f"observations {observations.dtype}{list(observations.shape)} of {spec.name}"
        wanted = f"float32{[len(observations), spec.num_actions]}"
        try:
            params = jax.eval_shape(network.init, key_shape()) if params is None else params
            q_values = jax.eval_shape(network.apply, params, observations)
        except ConfigError:
            raise
        except RAISED_BY_USERS as error:  # a user's network may raise anything
            raise ConfigError(
                f"a network must map {seen} to action values {wanted}, got {short(error)}; fit its "
                "first layer to the observations (uint8 isn't divided by 255 yet, stacked frames are the last axis)"
            ) from error
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", q_values)
        if shapes != wanted:
            raise ConfigError(
                f"a network must map {seen} to action values {wanted}, got {shapes}; fit its last layer to the "
                f"{spec.num_actions} actions, and let it return float32"
            )
    _check_outputs(network, config, params, batches[0], spec.num_actions)
    _check_recurrence(network, config, params, batches[0], spec.num_actions)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _checked(network: Network) -> Network:
    """Returns the network that a user gives, after checking that it is one."""
    if not isinstance(network, Network):
        raise ConfigError(
            f"`network` must be a qfleet.Network, got a {type(network).__name__}; convert a Flax NNX module by "
            f"qfleet.from_nnx(lambda rngs: ...)"
        )
    return network


def _check_outputs(
    network: Network, config: AgentConfig, params: Params, observations: jax.ShapeDtypeStruct, num_actions: int
) -> None:
    """Raises ConfigError unless the network returns what the agent's head takes."""
    head, wanted = make_head(config), (observations.shape[0], num_actions)
    if head.num_outputs is None and config.head != "iqn" and not config.noisy and network.outputs is None:
        return
    if config.head == "scalar" and not config.noisy and config.network is None:
        return
    setting = "noisy layers" if config.head == "scalar" and config.noisy else f"head {config.head}"
    remedy = "give its module a method outputs(observations, draws), see qfleet.Network, or leave the setting out"
    if network.outputs is None:
        raise ConfigError(f"a network of your own must have outputs to learn with {setting}, got none; {remedy}")
    try:
        outputs = jax.eval_shape(network.outputs, params, observations, None)
        num_outputs = None if head.num_outputs is None else outputs.shape[-1]
        fits = num_outputs == head.num_outputs and jax.eval_shape(head.q_values, outputs).shape == wanted
    except RAISED_BY_USERS as error:  # a user's network may raise anything
        raise ConfigError(f"the outputs of a network must suit {setting}, got {short(error)}; {remedy}") from error
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
            f"the recurrence of a network must suit its observations, got {short(error)}; {remedy}"
        ) from error
    wanted = (size, f"float32{[lanes, num_actions]}"), (size, f"float32{[rows, lanes, num_actions]}")
    if found != wanted:
        raise ConfigError(
            f"step and unroll of a recurrence must return the state and outputs of action values {wanted}, got "
            f"{found}; {remedy}"
        )
