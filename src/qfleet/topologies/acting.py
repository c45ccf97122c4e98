"""Acting in lanes written in JAX, as a function that any compiled program may call."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from qfleet.config import RunFailed
from qfleet.core.agent import Agent
from qfleet.core.memory import MemoryState
from qfleet.core.replay import Row, outcome_of
from qfleet.core.types import EnvSpec, Params
from qfleet.envs.in_graph import Lanes, StepKeys, init_lanes, step_lanes
from qfleet.envs.spec import InGraphEnv


class ActorState(NamedTuple):
    """The lanes, and what the agent remembers of each."""

    lanes: Lanes
    memory: MemoryState
    """What the agent remembers, `lanes.observation` included."""
    episode_return: Array
    """`[lanes]` float32, undiscounted return of the episode under way."""


class RowStats(NamedTuple):
    """Statistics of one row, `[lanes]`, or of an iteration, `[rows, lanes]`."""

    episode_ended: Array
    episode_return: Array
    episode_steps: Array
    q_max: Array
    is_bad: Array
    """bool, the reward or the next observation isn't finite."""


def init_actor(env: InGraphEnv, agent: Agent, key: Array, numbers: Array) -> ActorState:
    """Returns an actor in the lanes of these numbers, `[lanes]` integers, each at the start of an episode."""
    lanes = init_lanes(env, key, numbers)
    memory = agent.memory.init(agent.to_storage_layout(lanes.observation))
    return ActorState(lanes, memory, jnp.zeros(len(numbers)))


def saved_actor(actor: ActorState) -> dict[str, Any]:
    """Returns an actor as checkpoints hold it, where what it remembers lies beside the rest."""
    return {"lanes": actor.lanes, "episode_return": actor.episode_return, **actor.memory._asdict()}


def restored_actor(saved: dict[str, Any]) -> ActorState:
    """Returns the actor of which `saved_actor` returned this."""
    memory = MemoryState(*(saved[name] for name in MemoryState._fields))
    return ActorState(saved["lanes"], memory, saved["episode_return"])


def act(
    env: InGraphEnv,
    agent: Agent,
    params: Params,
    actor: ActorState,
    step_keys: StepKeys,
    uniform: Array,
    exploration: Array,
    noise_keys: Array | None = None,
) -> tuple[ActorState, Row, RowStats, Array]:
    """Takes one step of all lanes. The row that it returns has no next observation: the next row has it.

    `noise_keys` are one for each lane, `[lanes]`, if the agent acts with keys.

    Returns:
      The actor after the step, the row, its stats, and the values that chose the actions, `[lanes, num_actions]`.
    """
    lanes_tm1 = actor.lanes
    action, q, memory = agent.act(params, actor.memory, exploration, uniform, noise_keys)
    lanes, step = step_lanes(env, lanes_tm1, action, step_keys)
    outcome = outcome_of(step.terminated, step.truncated, lanes_tm1.final)
    obs = agent.to_storage_layout(lanes_tm1.observation)
    row = Row(obs, action, step.reward, outcome, carry=actor.memory.carry)
    episode_return = jnp.where(lanes_tm1.final, 0.0, actor.episode_return + step.reward)
    stats = RowStats(
        episode_ended=lanes.final,
        episode_return=episode_return,
        episode_steps=lanes.episode_steps,
        q_max=jnp.max(q, axis=-1),
        is_bad=~(jnp.isfinite(step.reward) & _is_finite(lanes.observation)),
    )
    memory = agent.memory.observe(memory, agent.to_storage_layout(lanes.observation), lanes_tm1.final)
    return ActorState(lanes, memory, episode_return), row, stats, q


def _is_finite(obs: Array) -> Array:
    """Returns whether each lane's observation is finite: `[lanes, ...]` to `[lanes]` bool."""
    return jnp.all(jnp.isfinite(obs).reshape(obs.shape[0], -1), axis=1)


def not_finite(spec: EnvSpec, where: str) -> RunFailed:
    """Returns the error of an environment that returned a number that isn't finite; `where` says in which step."""
    masks = "; a state that goes on without a valid action counts as one too" * spec.has_action_mask
    return RunFailed(f"rewards and observations must be finite, but {spec.name} returned one that isn't {where}{masks}")
