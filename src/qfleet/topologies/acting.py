"""Acting in lanes written in JAX, as a function that any compiled program may call."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from qfleet.core.agent import Agent
from qfleet.core.frame_stack import init_view, push_frame
from qfleet.core.replay import Row, outcome_of
from qfleet.core.types import Params
from qfleet.envs.in_graph import Draws, Lanes, init_lanes, step_lanes
from qfleet.envs.spec import InGraphEnv


class ActorState(NamedTuple):
    """The lanes, and what their agent keeps of them."""

    lanes: Lanes
    view: Array
    """`[lanes, ...]`, what the agent sees of `lanes.observation`: stored frames, stacked."""
    episode_return: Array
    """`[lanes]` float32, undiscounted, of the episode under way."""


class RowReport(NamedTuple):
    """What one row tells of itself. `[lanes]`, and `[rows, lanes]` of an iteration."""

    episode_ended: Array
    episode_return: Array
    episode_steps: Array
    q_max: Array
    is_bad: Array
    """bool, the reward or the next observation isn't finite."""


def init_actor(env: InGraphEnv, agent: Agent, key: Array, numbers: Array) -> ActorState:
    """Returns an actor in the lanes of these numbers, `[lanes]` integers, each at the start of an episode."""
    lanes = init_lanes(env, key, numbers)
    view = init_view(agent.to_storage_layout(lanes.observation), env.spec.frame_stack)
    return ActorState(lanes, view, jnp.zeros(len(numbers)))


def act(
    env: InGraphEnv, agent: Agent, params: Params, actor: ActorState, draws: Draws, uniform: Array, exploration: Array
) -> tuple[ActorState, Row, RowReport, Array]:
    """Takes one step of all lanes.

    Returns:
      The actor after it, the row that it made, its report, and the values that it acted by, `[lanes, num_actions]`.
    """
    lanes_tm1 = actor.lanes
    q = agent.q_values(params, actor.view)
    action = agent.explore(q, exploration, uniform)
    lanes, step = step_lanes(env, lanes_tm1, action, draws)
    outcome = outcome_of(step.terminated, step.truncated, lanes_tm1.final)
    row = Row(agent.to_storage_layout(lanes_tm1.observation), action, step.reward, outcome)
    episode_return = jnp.where(lanes_tm1.final, 0.0, actor.episode_return + step.reward)
    report = RowReport(
        episode_ended=lanes.final,
        episode_return=episode_return,
        episode_steps=lanes.episode_steps,
        q_max=jnp.max(q, axis=-1),
        is_bad=~(jnp.isfinite(step.reward) & _is_finite(lanes.observation)),
    )
    view = push_frame(actor.view, agent.to_storage_layout(lanes.observation), lanes_tm1.final, env.spec.frame_stack)
    return ActorState(lanes, view, episode_return), row, report, q


def _is_finite(obs: Array) -> Array:
    """Returns whether each lane's observation is finite: `[lanes, ...]` to `[lanes]` bool."""
    return jnp.all(jnp.isfinite(obs).reshape(obs.shape[0], -1), axis=1)
