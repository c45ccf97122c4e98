"""Checks of a user's own parts (MODULE:NAME), before training: shapes, types, purity, finite values, gradients.

Each part is traced twice with inputs of a small batch. Both traces must be the same, because a compiled program holds
what the first one found. Then it is computed once, on numbers from a fixed seed. With a batch of another size, it is
only traced.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qfleet.config import AgentConfig, ConfigError
from qfleet.config.errors import RAISED_BY_USERS, short
from qfleet.config.own_parts import own_parts
from qfleet.core.exploration import make_explore
from qfleet.core.heads import Head, SampleLosses, Values, backed_up, make_head
from qfleet.core.keys import Draws, key_shape
from qfleet.core.own_targets import NetworkOutputs, make_own_target
from qfleet.core.types import EnvSpec, Network, Transition, stored_spec
from qfleet.networks.adapters import check_network, make_plain_network

_BATCH_SIZES = (3, 5)
"""Samples of a batch. Hardly anything else has these sizes, and nothing has both."""

_PURE = "compute with jax.numpy alone, and draw from the keys and numbers that it is given"


def check_own_parts(spec: EnvSpec, config: AgentConfig, given: Network | None = None, *, computes: bool = True) -> None:
    """Checks the parts of an agent that its config names as MODULE:NAME. Without any, it does nothing.

    Args:
      spec: of the environment.
      config: of the agent.
      given: a network that replaces the one that `config` describes.
      computes: whether to compute something, which starts JAX's devices. Otherwise parts are only traced.

    Raises:
      ConfigError: if a part breaks its contract. The message says which part, and how.
    """
    parts = own_parts(config)
    if not parts:
        return
    spec = dataclasses.replace(spec, has_action_mask=False)
    for batch_size in _BATCH_SIZES:
        _check_parts(parts, spec, config, given, batch_size, computes and batch_size == _BATCH_SIZES[0])


def _check_parts(
    parts: Mapping[str, str], spec: EnvSpec, config: AgentConfig, given: Network | None, batch_size: int, computes: bool
) -> None:
    random = np.random.default_rng(0)
    if "exploration" in parts:
        _check_explorer(parts["exploration"], spec.num_actions, config, random, batch_size, computes)
    is_ours = given is None and "network" not in parts
    if "head" in parts and is_ours:  # before the built-in network, which calls it
        _check_head(parts["head"], _outputs_of_ours(spec, config, batch_size), config, random, computes)
    network = make_plain_network(spec, config) if given is None else given
    check_network(network, spec, config)
    if "network" in parts:
        _check_network(parts["network"], network, spec, random, batch_size, computes)
    if "head" in parts and not is_ours:
        _check_head(parts["head"], _outputs_of(network, spec, batch_size), config, random, computes)
    if "target" in parts:
        _check_target(parts["target"], _outputs_of(network, spec, batch_size), config, random, computes)


def _check_explorer(
    name: str, num_actions: int, config: AgentConfig, random: np.random.Generator, batch_size: int, computes: bool
) -> None:
    explore, what = make_explore(config), f"exploration {name}: explore(q, exploration, uniform)"
    q = random.normal(size=(batch_size, num_actions)).astype(np.float32)
    for exploration in (config.exploration_start, config.exploration_end):
        inputs = (q, np.float32(exploration), random.random(batch_size).astype(np.float32))
        found, wanted = _describe(_traced(what, explore, *inputs)), f"int32[{batch_size}]"
        _check(found == wanted, what, f"return actions, {wanted} here", found)
        if computes:
            action = np.asarray(jax.jit(explore)(*inputs))
            holds = bool(np.all((action >= 0) & (action < num_actions)))
            _check(holds, what, f"return actions from 0 to {num_actions - 1}", action.tolist())


def _check_head(name: str, shapes: Any, config: AgentConfig, random: np.random.Generator, computes: bool) -> None:
    head = make_head(config)
    outputs, others = _random_like(shapes, random), _random_like(shapes, random)
    batch_size, num_actions = jax.tree.leaves(shapes)[0].shape[:2]
    what, wanted = f"head {name}", f"float32[{batch_size}, {num_actions}]"
    q = _traced(f"{what}: q_values(outputs)", head.q_values, outputs)
    _check(_describe(q) == wanted, f"{what}: q_values(outputs)", f"return {wanted} here", _describe(q))
    action = np.arange(batch_size, dtype=np.int32) % num_actions
    policy = np.full((batch_size, num_actions), 1 / num_actions, np.float32)
    _check_values(f"{what}: values_of(outputs, action)", head.values_of, computes, outputs, action)
    _check_values(f"{what}: mixture(outputs, policy, bonus)", head.mixture, computes, outputs, policy, policy)

    def losses(outputs: Any, others: Any, action: Any, reward: Any) -> SampleLosses:
        return head.loss(outputs, action, backed_up(reward, reward, head.values_of(others, action)))

    what, reward = f"{what}: loss(outputs, action, target)", random.random(batch_size).astype(np.float32)
    found = _traced(what, losses, outputs, others, action, reward)
    is_record = isinstance(found, SampleLosses) and set(map(_describe, found)) == {f"float32[{batch_size}]"}
    _check(is_record, what, f"return SampleLosses, each of its fields float32[{batch_size}] here", _describe(found))

    def mean_loss(outputs: Any, *others: Any) -> tuple[Any, SampleLosses]:
        found = losses(outputs, *others)
        return jnp.mean(found.loss), found

    _check_gradient(what, "outputs", mean_loss, computes, outputs, others, action, reward)


def _check_network(
    name: str, network: Network, spec: EnvSpec, random: np.random.Generator, batch_size: int, computes: bool
) -> None:
    what = f"network {name}: apply(params, observations)"
    params = _traced(f"network {name}: init(key)", network.init, key_shape())
    observations = _random_like(_observations(network, spec, batch_size), random)
    if network.outputs is not None:
        draws = jax.eval_shape(lambda: Draws(jax.random.key(0), jax.random.split(jax.random.key(0), batch_size)))
        _traced(f"network {name}: outputs(params, observations, draws)", network.outputs, params, observations, draws)

    def mean_square(params: Any, observations: Any) -> tuple[Any, Any]:
        q = network.apply(params, observations)
        return jnp.mean(jnp.square(q - 1.0)), q

    if computes:
        params = jax.jit(network.init)(jax.random.key(0))
    _check_gradient(what, "params", mean_square, computes, params, observations)


def _check_target(name: str, shapes: Any, config: AgentConfig, random: np.random.Generator, computes: bool) -> None:
    target, head = make_own_target(config), make_head(config)
    assert target is not None
    outputs = NetworkOutputs(*(_random_like(shapes, random) for _ in range(4)))
    batch_size, num_actions = jax.tree.leaves(shapes)[0].shape[:2]
    numbers = [random.random(batch_size).astype(np.float32) for _ in range(3)]
    obs = np.zeros((batch_size, 1), np.float32)
    fields: Any = (obs, np.arange(batch_size, dtype=np.int32) % num_actions, numbers[0], numbers[1], obs, numbers[2])
    what = f"target {name}: target(head, batch, outputs)"
    _check_values(what, lambda batch, outputs: target(head, batch, outputs), computes, Transition(*fields), outputs)


# --- What is checked of each ---


def _check_values(what: str, function: Callable[..., Any], computes: bool, *inputs: Any) -> None:
    """Checks that a function returns distributions: finite values, with weights that add up to 1."""
    found, batch_size = _traced(what, function, *inputs), jax.tree.leaves(inputs)[0].shape[0]
    descriptions = set(map(_describe, found)) if isinstance(found, Values) else set()
    holds = len(descriptions) == 1 and bool(re.fullmatch(rf"float32\[{batch_size}, \d+\]", min(descriptions)))
    _check(holds, what, f"return Values, value and weight float32[{batch_size}, values] each", _describe(found))
    if computes:
        computed: Values = jax.device_get(jax.jit(lambda *inputs: function(*inputs))(*inputs))
        _check(bool(np.all(np.isfinite(computed.value))), what, "return finite values", computed.value.tolist())
        sums = computed.weight.sum(axis=-1)
        _check(bool(np.allclose(sums, 1.0, atol=1e-3)), what, "return weights that add up to 1", sums.tolist())


def _check_gradient(what: str, by: str, loss: Callable[..., Any], computes: bool, *inputs: Any) -> None:
    """Checks that a function returns finite numbers, and that its first result has a gradient by the first input."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    _traced(f"{what}, differentiated by its {by},", gradient, *inputs)
    if not computes:
        return
    (_, found), grads = jax.device_get(jax.jit(lambda *inputs: gradient(*inputs))(*inputs))
    _check(_all_finite(found), what, "return finite numbers", _in_numbers(found))
    _check(_all_finite(grads), what, f"have a finite gradient by its {by}", _in_numbers(grads))
    holds = any(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    _check(holds, what, f"depend on its {by} differentiably", "a gradient of 0 everywhere")


def _traced(what: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """Returns the shapes of what a function returns, after checking that JAX can trace it, and traces it alike twice.

    Raises:
      ConfigError: if not.
    """
    try:
        first, second = (jax.make_jaxpr(lambda *inputs: function(*inputs), return_shape=True)(*inputs) for _ in "12")
        consts = [[np.asarray(const) for const in jaxpr.consts] for jaxpr, _ in (first, second)]
    except RAISED_BY_USERS as error:  # a user's function may raise anything
        raise ConfigError(f"{what} must be traceable by JAX, got {short(error)}; {_PURE}") from error
    texts = [re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) for jaxpr, _ in (first, second)]
    same = texts[0] == texts[1] and all(map(np.array_equal, *consts))
    _check(same, what, "compute the same each time that JAX traces it", f"something else the second time; {_PURE}")
    return first[1]


def _check(holds: bool, what: str, rule: str, got: Any) -> None:
    if not holds:
        raise ConfigError(f"{what} must {rule}, got {got}")


# --- Inputs ---


def _outputs_of_ours(spec: EnvSpec, config: AgentConfig, batch_size: int) -> Any:
    """Returns the shapes of what the built-in network returns to a head for a small batch."""
    head: Head = make_head(config)
    last = () if head.num_outputs is None else (head.num_outputs,)
    return jax.ShapeDtypeStruct((batch_size, spec.num_actions, *last), jnp.float32)


def _outputs_of(network: Network, spec: EnvSpec, batch_size: int) -> Any:
    """Returns the shapes of what a network returns to the head for a small batch."""
    params, observations = jax.eval_shape(network.init, key_shape()), _observations(network, spec, batch_size)
    if network.outputs is None:
        return jax.eval_shape(network.apply, params, observations)
    return jax.eval_shape(network.outputs, params, observations, None)


def _observations(network: Network, spec: EnvSpec, batch_size: int) -> jax.ShapeDtypeStruct:
    stored = stored_spec(spec, network.to_storage_layout)
    return jax.ShapeDtypeStruct((batch_size, *stored.agent_observation_shape), stored.observation_dtype)


def _random_like(shapes: Any, random: np.random.Generator) -> Any:
    """Returns random arrays of these shapes: floats between 0 and 1, and whole numbers below 2."""

    def draw(leaf: Any) -> np.ndarray:
        is_float = np.issubdtype(leaf.dtype, np.floating)
        drawn = random.random(leaf.shape) if is_float else random.integers(2, size=leaf.shape)
        return drawn.astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


# --- What is said ---


def _all_finite(tree: Any) -> bool:
    return all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def _in_numbers(tree: Any) -> str:
    for leaf in jax.tree.leaves(tree):
        if not np.all(np.isfinite(leaf)):
            return str(leaf[~np.isfinite(leaf)].ravel()[0])
    return ""


def _describe(tree: Any) -> str:
    """Returns the types and shapes of a tree of arrays, as in `float32[3, 2]`."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}{list(tree.shape)}"
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))[:300]
