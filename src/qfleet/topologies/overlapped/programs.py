"""The pure functions that `qfleet.topologies.overlapped` compiles: acting, storing and learning."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.agent import Agent, row_noise_keys
from qfleet.core.keys import Stream, key_of, sample_keys
from qfleet.core.learner import Learner, LearnerState
from qfleet.core.memory import MemoryState
from qfleet.core.replay import Replay, ReplayState, Row, SavedReplay, outcome_of, sealed_outcomes
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import Params, Regression
from qfleet.core.updates import Losses, learn_from_replay, learn_from_rollout, no_losses, regression
from qfleet.topologies.schedule import rows_per_iteration


class HostRow(NamedTuple):
    """One step of all lanes, as a program takes it: `[lanes, ...]`, or `[rows, lanes, ...]` for a rollout."""

    obs: Any
    """`()` in a rollout, whose observations are in the agent's memories beside it."""
    action: Any
    reward: Any
    terminated: Any
    truncated: Any
    no_step: Any
    """bool, the row holds no step, because the lane was at a final observation or its environment failed."""
    carry: Any = ()
    """What a recurrent network remembered before the observation, on the devices; `()` in a rollout."""

    def with_obs(self, obs: Array) -> Row:
        """Returns the row as a replay stores it, with observations in their storage layout."""
        outcome = outcome_of(self.terminated, self.truncated, self.no_step)
        return Row(obs, self.action, self.reward, outcome, carry=self.carry)


class RandomInputs(NamedTuple):
    """The random numbers of one iteration."""

    uniforms: Array
    """`[rows, lanes]`, for exploration."""
    learn_keys: Array
    """`[rows]` with replay; `[]` without."""
    noise_keys: Array | tuple[()]
    """`[rows]`, for agents that act with keys; `()` for others."""


class Programs(NamedTuple):
    """Pure functions. Each is compiled once, except that `profile` compiles the parts of `learn` instead of `learn`."""

    init: Callable[[Array], tuple[LearnerState, ReplayState | tuple[()], Array]]
    """`init(seed) -> learner, replay, key`."""
    draw: Callable[[Array], tuple[Array, RandomInputs]]
    """`draw(key) -> key, inputs`."""
    act: Callable[..., tuple[MemoryState, Array, Array, Any]]
    """`act(params, memory, obs, is_first, exploration, uniform, noise_key) -> memory, action, q_max, carry`: `memory`
    is what the agent remembers of the rows before, `obs` holds the newest observations, and `is_first` says which of
    them start an episode. `carry` is what a recurrent network remembered before `obs`, `()` for others."""
    learn: Callable[..., tuple]
    """With replay: `learn(learner, replay, row, key, importance_exponent, num_updates) -> learner, replay, losses`.
    Without replay: `learn(learner, rows, memories, q_max, carry, next_obs, next_is_first, key) -> learner, losses`,
    for one rollout. `memories` is what `act` returned in each row, and `carry` what it returned in the first."""
    rollout_batch: Callable[..., Regression]
    """`rollout_batch(params, rows, memories, q_max, carry, next_obs, next_is_first) -> batch`, for one rollout."""
    insert: Callable[[ReplayState, HostRow], ReplayState]
    """`insert(replay, row) -> replay`; where the row has no step, the steps before it are cut short."""
    replay_leaves: Callable[[ReplayState], Array | tuple[()]]
    """`replay_leaves(replay) -> priorities`, in the form that `SavedReplay` holds."""
    restore_replay: Callable[[SavedReplay], ReplayState]
    """`restore_replay(saved) -> replay`."""


def make_programs(
    config: AgentConfig,
    num_lanes: int,
    agent: Agent,
    learner: Learner,
    replay: Replay | None,
    replicas: Replicas = ALONE,
) -> Programs:
    """Returns the programs of one learner and `num_lanes` lanes.

    With several replicas, each runs the programs on its share of the lanes, except `draw`, which draws for all lanes.
    """

    def init(seed: Array) -> tuple[LearnerState, ReplayState | tuple[()], Array]:
        params_key, _, state_key = jax.random.split(key_of(seed, Stream.TRAINING), 3)
        return learner.init(agent.init(params_key)), replay.init() if replay else (), state_key

    def draw(key_tm1: Array) -> tuple[Array, RandomInputs]:
        num_rows = rows_per_iteration(config)
        # The second key is unused: in `fused`, which draws the same numbers, it is the environment's.
        key, _, explore_key, learn_key = jax.random.split(key_tm1, 4)
        uniforms = jax.random.uniform(explore_key, (num_rows, num_lanes))
        learn_keys = jax.random.split(learn_key, num_rows) if replay else learn_key
        noise = row_noise_keys(key_tm1, num_rows) if agent.acts_with_keys else ()
        return key, RandomInputs(uniforms, learn_keys, noise)

    def act(
        params: Params,
        memory: MemoryState,
        obs: Array,
        is_first: Array,
        exploration: Array,
        uniform: Array,
        noise_key: Any,
    ) -> tuple[MemoryState, Array, Array, Any]:
        memory = agent.memory.observe(memory, agent.to_storage_layout(obs), is_first)
        has_noise = not isinstance(noise_key, tuple)
        keys = sample_keys(noise_key, local_lane_ids(replicas, len(uniform))) if has_noise else None
        acted = agent.act(params, memory, exploration, uniform, keys)
        return acted.memory, acted.action, jnp.max(acted.q, axis=-1), memory.carry

    def insert(replay_state: ReplayState, row: HostRow) -> ReplayState:
        assert replay is not None
        return replay.insert(replay.seal(replay_state, row.no_step), row.with_obs(agent.to_storage_layout(row.obs)))

    def replay_leaves(replay_state: ReplayState) -> Array | tuple[()]:
        return replay.leaves(replay_state) if replay else ()

    def restore_replay(saved: SavedReplay) -> ReplayState:
        assert replay is not None
        return replay.restore(saved)

    rollout_batch = _make_rollout_batch(config, agent)
    learn = (
        _make_learn_from_replay(learner, replay, insert, replicas)
        if replay
        else _make_learn_from_rollout(config, learner, rollout_batch, replicas)
    )
    return Programs(init, draw, act, learn, rollout_batch, insert, replay_leaves, restore_replay)


def _make_learn_from_replay(
    learner: Learner, replay: Replay, insert: Callable[[ReplayState, HostRow], ReplayState], replicas: Replicas
) -> Callable[..., tuple[LearnerState, ReplayState, Losses]]:
    """Returns `Programs.learn` for agents with a replay: store a row, then take the learner steps that are due."""

    def learn(
        learner_state: LearnerState,
        replay_state: ReplayState,
        row: HostRow,
        key: Array,
        importance_exponent: Array,
        num_updates: Array,
    ) -> tuple[LearnerState, ReplayState, Losses]:
        state = (learner_state, insert(replay_state, row), no_losses())
        learner_state, replay_state, losses = learn_from_replay(
            learner, replay, state, key, importance_exponent, num_updates, replicas
        )
        return learner_state, replay_state, replicas.mean(losses)

    return learn


def _make_learn_from_rollout(
    config: AgentConfig, learner: Learner, rollout_batch: Callable[..., Regression], replicas: Replicas
) -> Callable[..., tuple[LearnerState, Losses]]:
    """Returns `Programs.learn` for agents without a replay: some epochs of regression on one rollout's returns."""

    def learn(
        state: LearnerState,
        rows: HostRow,
        memories: tuple[MemoryState, ...],
        q_max: tuple[Array, ...],
        carry: Any,
        next_obs: Array,
        next_is_first: Array,
        key: Array,
    ) -> tuple[LearnerState, Losses]:
        batch = rollout_batch(state.params, rows, memories, q_max, carry, next_obs, next_is_first)
        state, losses = learn_from_rollout(learner, state, batch, key, config, replicas)
        return state, replicas.mean(losses)

    return learn


def _make_rollout_batch(config: AgentConfig, agent: Agent) -> Callable[..., Regression]:
    def rollout_batch(
        params: Params,
        rows: HostRow,
        memories: tuple[MemoryState, ...],
        q_max: tuple[Array, ...],
        carry: Any,
        next_obs: Array,
        next_is_first: Array,
    ) -> Regression:
        stored = rows.with_obs(jnp.stack([memory.view for memory in memories]))
        memory = agent.memory.observe(memories[-1], agent.to_storage_layout(next_obs), next_is_first)
        next_value = jnp.max(agent.act_values(params, memory)[0], axis=-1)
        return regression(_sealed(stored), jnp.stack(q_max), next_value, config, carry)

    return rollout_batch


def _sealed(rows: Row) -> Row:
    """Returns a rollout in which no return reaches beyond a row without a step: the steps before it are cut short."""
    return rows._replace(outcome=sealed_outcomes(rows.outcome))
