"""An agent: how a Q-network acts, and the loss that it learns from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.config.own_parts import is_own_name
from qfleet.core import exploration
from qfleet.core.activity import Activity
from qfleet.core.batch_loss import Loss, make_loss
from qfleet.core.heads import make_head, masked_head
from qfleet.core.keys import NOISE, Draws, sample_keys
from qfleet.core.masks import INVALID, valid_or_greedy
from qfleet.core.memory import Memory, MemoryState, make_memory
from qfleet.core.normalisation import IN_TREE, StatisticsPlace, normalises, value_scale
from qfleet.core.player import Player, make_player
from qfleet.core.rescaling import unscale
from qfleet.core.types import Network, Params


class Acted(NamedTuple):
    """What an agent does in each lane."""

    action: Array
    """`[lanes]` int32."""
    q: Array
    """`[lanes, num_actions]` float32, the values that chose it."""
    memory: MemoryState
    """What the agent remembers from now on. It has yet to `observe` what the action leads to."""


class Agent(NamedTuple):
    """The pure functions of an agent."""

    init: Callable[[Array], Params]
    """`init(key) -> params`."""
    q_values: Callable[..., Array]
    """`q_values(params, obs, keys=None) -> q`, `[batch, ...]` to `[batch, num_actions]`. With `keys`, `[batch]`, they
    have the noise of each lane; without, they are the mean."""
    loss: Loss
    """`loss(params, target_params, batch, draws=None) -> loss, of_samples`; the loss is `[]`, the weighted mean."""
    to_storage_layout: Callable[[Array], Array]
    """`to_storage_layout(obs) -> obs`, the same as `Network.to_storage_layout`."""
    memory: Memory
    """What the agent remembers of each lane."""
    act_values: Callable[..., tuple[Array, MemoryState]]
    """`act_values(params, memory, keys=None) -> q, memory`, the values of each lane's newest observation, as `q_values`
    returns them. The new memory of a recurrent network includes that observation."""
    act: Callable[..., Acted]
    """`act(params, memory, exploration, uniform, keys=None) -> acted` chooses an action in each lane. `exploration` is
    epsilon or the temperature, `[]`, `uniform` is one uniform number per lane, `[lanes]`, and `act_values` takes the
    rest."""
    player: Player
    """Plays without exploring."""
    acts_with_keys: bool = False
    """Whether `q_values` is given keys to act: the network's noise explores."""
    loss_draws: bool = False
    """Whether `loss` needs `draws`."""
    priority_is_td_error: bool = True
    """Whether priorities are TD errors, so that an actor that knows Q-values can compute them."""
    carry_size: int = 0
    """Numbers that a recurrent network remembers of each lane; 0 without memory."""
    statistics: StatisticsPlace | None = None
    """Where the parameters hold statistics, with which the agent normalises; None if it doesn't."""


def noise_keys(agent: Agent, key: Array, num_rows: int, lane_numbers: Array) -> Array | None:
    """Returns the keys with which an agent acts, `[rows, lanes]`, or None if it acts without.

    Args:
      agent: the agent.
      key: from which everything else is derived by smaller numbers than `NOISE`.
      num_rows: number of rows.
      lane_numbers: `[lanes]`, the number of each lane among all lanes.
    """
    if not agent.acts_with_keys:
        return None
    return jax.vmap(sample_keys, (0, None))(row_noise_keys(key, num_rows), lane_numbers)


def row_noise_keys(key: Array, num_rows: int) -> Array:
    """Returns the keys, `[rows]`, from which `noise_keys` derives those of the lanes."""
    return jax.random.split(jax.random.fold_in(key, NOISE), num_rows)


def make_agent(network: Network, config: AgentConfig, frame_stack: int = 1) -> Agent:
    """Returns the agent that `config` describes. Its Q-values are those of `network`.

    Args:
      network: the Q-network.
      config: the agent's config.
      frame_stack: number of frames that it sees at once when it acts.
    """
    head = masked_head(make_head(config)) if network.is_masked else make_head(config)
    recurrence, player = network.recurrence, make_player(network, frame_stack)
    explore = exploration.make_explore(config, is_masked=network.is_masked)
    repeats, repeat = config.exploration_max_duration > 1, exploration.make_repeat(config)
    outputs_of = network.outputs or (lambda params, obs, draws: network.apply(params, obs))

    def q_values(params: Params, obs: Array, keys: Array | None = None) -> Array:
        if keys is None:
            return network.apply(params, obs)
        q = head.q_values(outputs_of(params, obs, Draws(keys)))
        return jnp.maximum(q * value_scale(params, config), INVALID) if config.normalise_rewards else q

    def act_values(params: Params, memory: MemoryState, keys: Array | None = None) -> tuple[Array, MemoryState]:
        if recurrence is None:
            return q_values(params, memory.view, keys), memory
        is_first = jnp.zeros(len(memory.view), bool)  # `observe` has reset those that are
        draws = None if keys is None else Draws(keys)
        carry, outputs = recurrence.step(params, memory.carry, memory.view, is_first, draws)
        return head.q_values(outputs), memory._replace(carry=carry)

    def act(
        params: Params, memory: MemoryState, exploration: Array, uniform: Array, keys: Array | None = None
    ) -> Acted:
        q, memory = act_values(params, memory, keys)
        action = explore(q, exploration, uniform)
        if repeats:
            action, repetition = repeat(action, exploration, uniform, memory.explorer)
            memory = memory._replace(explorer=repetition)
        if network.is_masked:  # an explorer needn't know of masks
            action = valid_or_greedy(action, q)
        return Acted(action, q, memory)

    return Agent(
        init=network.init,
        q_values=q_values,
        loss=make_loss(network, outputs_of, head, config),
        to_storage_layout=network.to_storage_layout,
        memory=make_memory(network, frame_stack, exploration.no_repetition if repeats else None),
        act_values=act_values,
        act=act,
        player=_with_returns(player) if config.value_rescaling else player,
        acts_with_keys=config.noisy,
        loss_draws=config.noisy or config.head == "iqn" or is_own_name(config.head) or config.network is not None,
        priority_is_td_error=head.priority_is_td_error and not config.learns_sequences,
        carry_size=0 if recurrence is None else jax.eval_shape(lambda: recurrence.initial(1)).shape[-1],
        statistics=IN_TREE if normalises(config) else None,
    )


def _with_returns(player: Player) -> Player:
    """Returns the player of a network of rescaled values, whose values are in units of discounted reward again."""

    def values(params: Params, memory: MemoryState) -> tuple[Array, MemoryState, Activity]:
        q, memory, activity = player.values(params, memory)
        return unscale(q), memory, activity

    return player._replace(values=values)
