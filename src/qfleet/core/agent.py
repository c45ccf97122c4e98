"""An agent: how a Q-network acts, and the loss that it learns from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core import exploration, losses, targets
from qfleet.core.activity import Activity, make_with_activity
from qfleet.core.types import Batch, Network, Params, Regression, Transition


class Agent(NamedTuple):
    """The pure functions of an agent."""

    init: Callable[[Array], Params]
    """`init(key) -> params`."""
    q_values: Callable[[Params, Array], Array]
    """`q_values(params, obs) -> q`, `[batch, ...]` to `[batch, num_actions]`."""
    explore: Callable[[Array, Array, Array], Array]
    """`explore(q, exploration, uniform) -> action`, `[lanes]` int32. Here `q` is `[lanes, num_actions]`, `exploration`
    is epsilon or the temperature, `[]`, and `uniform` is one uniform number per lane, `[lanes]`."""
    loss: Callable[[Params, Params, Batch], tuple[Array, Array]]
    """`loss(params, target_params, batch) -> loss, td_error`, which are `[]` and `[batch]`."""
    to_storage_layout: Callable[[Array], Array]
    """`to_storage_layout(obs) -> obs`, the same as `Network.to_storage_layout`."""
    with_activity: Callable[[Params, Array], tuple[Array, Activity]]
    """`with_activity(params, obs) -> q, activity`: also how active each hidden unit was, `[batch, units]` a layer."""


def make_agent(network: Network, config: AgentConfig) -> Agent:
    """Returns the agent that `config` describes. Its Q-values are those of `network`."""
    elementwise_loss = losses.make_loss(config)

    def td_targets(params: Params, target_params: Params, batch: Transition) -> Array:
        q_target_t = network.apply(target_params, batch.next_obs)
        if not config.double:
            return jax.vmap(targets.q_target)(batch.reward, batch.discount, q_target_t)
        q_online_t = network.apply(params, batch.next_obs)
        return jax.vmap(targets.double_q_target)(batch.reward, batch.discount, q_online_t, q_target_t)

    def loss(params: Params, target_params: Params, batch: Batch) -> tuple[Array, Array]:
        target = batch.target if isinstance(batch, Regression) else td_targets(params, target_params, batch)
        td_error = target - targets.take_action(network.apply(params, batch.obs), batch.action)
        return jnp.mean(batch.weight * elementwise_loss(td_error)), td_error

    explore = exploration.softmax if config.exploration == "softmax" else exploration.epsilon_greedy
    return Agent(
        init=network.init,
        q_values=network.apply,
        explore=explore,
        loss=loss,
        to_storage_layout=network.to_storage_layout,
        with_activity=make_with_activity(network),
    )
