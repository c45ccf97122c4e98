"""The program that `qfleet.topologies.fused` compiles: acting and learning as pure functions of one state."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from qfleet.config import AgentConfig, TrainConfig
from qfleet.core.agent import Agent
from qfleet.core.keys import Stream, key_of
from qfleet.core.learner import Learner, LearnerState
from qfleet.core.replay import Replay, ReplayState, Row, SavedReplay, make_replay, partition
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import Params, stored_spec
from qfleet.core.updates import Losses, learn_from_replay, learn_from_rollout, no_losses, regression
from qfleet.envs.in_graph import draw
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import greedy_returns
from qfleet.topologies.acting import ActorState, RowReport, act, init_actor
from qfleet.topologies.schedule import Plan, rows_per_iteration

NO_BAD_STEP = np.iinfo(np.int32).max


class FusedState(NamedTuple):
    """Everything that the compiled program changes; a checkpoint holds it, and the host's counters."""

    learner: LearnerState
    actor: ActorState
    replay: ReplayState | tuple[()]
    key: Array


class Tally(NamedTuple):
    """Sums over a chunk, `[]` each."""

    num_episodes: Array
    episode_return: Array
    episode_steps: Array
    q_max: Array
    """Of each row's mean over lanes."""
    losses: Losses
    bad_step: Array
    """int32, the chunk's first non-finite environment step, `row * lanes + lane`; `NO_BAD_STEP` if none."""


Iteration = Callable[[FusedState, Plan], tuple[FusedState, RowReport, Losses]]
"""`iteration(state, plan [rows]) -> state, reports [rows, lanes], losses`."""


class Program(NamedTuple):
    """The pure functions that are compiled, for one seed; with replicas, each runs them with its share of the lanes."""

    init: Callable[[Array], FusedState]
    """`init(seed) -> state`, from a `[]` uint32."""
    run: Callable[[FusedState, Plan, Array], tuple[FusedState, Tally]]
    """`run(state, plan, num_iterations) -> state, tally`."""
    evaluate: Callable[[Params, Array, Array, Array], Array]
    """`evaluate(params, seed, moment, batch) -> returns`, of `eval_episodes` greedy episodes: others for each seed,
    moment of the run and batch."""
    leaves: Callable[[ReplayState], Array | tuple[()]]
    """`leaves(replay) -> priorities`, what `SavedReplay` holds of them."""
    restore: Callable[[SavedReplay], ReplayState]
    """`restore(saved) -> replay`."""


def partition_state(state: FusedState, axis: str) -> Any:
    """Returns how the state's arrays are spread over the replicas along a mesh axis, as `PartitionSpec`s."""
    mine, replicated = cast(Any, PartitionSpec(axis)), cast(Any, PartitionSpec())
    return FusedState(
        learner=jax.tree.map(lambda x: replicated, state.learner),
        actor=jax.tree.map(lambda x: mine, state.actor),
        replay=state.replay and partition(state.replay, axis),
        key=replicated,
    )


def make_program(
    config: TrainConfig, env: InGraphEnv, agent: Agent, learner: Learner, replicas: Replicas = ALONE
) -> Program:
    """Returns the program that trains one learner in `config.topology.num_envs` lanes of `env`."""
    num_lanes = config.topology.num_envs // replicas.size
    has_replay = config.agent.replay != "none"
    spec = stored_spec(env.spec, agent.to_storage_layout)
    replay = make_replay(spec, config.agent, config.topology.num_envs, replicas) if has_replay else None
    iterate = (
        _replay_iteration(env, agent, learner, replay, num_lanes, replicas)
        if replay
        else _rollout_iteration(config.agent, env, agent, learner, num_lanes, replicas)
    )
    num_rows = rows_per_iteration(config.agent)

    def init(seed: Array) -> FusedState:
        params_key, lanes_key, state_key = jax.random.split(key_of(seed, Stream.TRAINING), 3)
        actor = init_actor(env, agent, lanes_key, local_lane_ids(replicas, num_lanes))
        return FusedState(learner.init(agent.init(params_key)), actor, replay.init() if replay else (), state_key)

    def run(state: FusedState, plan: Plan, num_iterations: Array) -> tuple[FusedState, Tally]:
        def iteration(i: Array, carry: tuple[FusedState, Tally]) -> tuple[FusedState, Tally]:
            state, tally = carry
            state, reports, losses = iterate(state, jax.tree.map(lambda x: x[i], plan))
            return state, _add(tally, reports, losses, i * num_rows, replicas)

        state, tally = jax.lax.fori_loop(0, num_iterations, iteration, (state, _empty_tally()))
        return state, _joined(tally, replicas)

    def evaluate(params: Params, seed: Array, moment: Array, batch: Array) -> Array:
        key = key_of(seed, Stream.EVALUATION, moment, batch)
        return greedy_returns(env, agent.q_values, params, key, config.eval_episodes, agent.to_storage_layout, replicas)

    def leaves(state: ReplayState) -> Array | tuple[()]:
        return replay.leaves(state) if replay else ()

    def restore(saved: SavedReplay) -> ReplayState:
        assert replay is not None
        return replay.restore(saved)

    return Program(init, run, evaluate, leaves, restore)


def _replay_iteration(
    env: InGraphEnv, agent: Agent, learner: Learner, replay: Replay, num_lanes: int, replicas: Replicas
) -> Iteration:
    """Each row: act, insert, and as many learner steps as planned."""

    def iteration(state: FusedState, plan: Plan) -> tuple[FusedState, RowReport, Losses]:
        num_rows = plan.exploration.size
        key, env_key, explore_key, learn_key = jax.random.split(state.key, 4)
        draws = draw(env, env_key, num_rows, local_lane_ids(replicas, num_lanes))
        uniforms = _uniforms(explore_key, num_rows, num_lanes, replicas)

        def row(carry: tuple, inputs: tuple) -> tuple[Any, RowReport]:
            learner_state, actor, replay_state, losses = carry
            draws, uniform, plan, learn_key = inputs
            actor, new_row, report, _ = act(env, agent, learner_state.params, actor, draws, uniform, plan.exploration)

            state = (learner_state, replay.insert(replay_state, new_row), losses)
            learner_state, replay_state, losses = learn_from_replay(
                learner, replay, state, learn_key, plan.importance_exponent, plan.num_updates, replicas
            )
            return (learner_state, actor, replay_state, losses), report

        carry = (state.learner, state.actor, state.replay, no_losses())
        inputs = (draws, uniforms, plan, jax.random.split(learn_key, num_rows))
        (learner_state, actor, replay_state, losses), reports = jax.lax.scan(row, carry, inputs)
        return FusedState(learner_state, actor, replay_state, key), reports, losses

    return iteration


def _rollout_iteration(
    config: AgentConfig, env: InGraphEnv, agent: Agent, learner: Learner, num_lanes: int, replicas: Replicas
) -> Iteration:
    """One rollout of all lanes, its lambda-returns, and some epochs of regression on them."""

    def iteration(state: FusedState, plan: Plan) -> tuple[FusedState, RowReport, Losses]:
        num_rows = plan.exploration.size
        key, env_key, explore_key, shuffle_key = jax.random.split(state.key, 4)
        draws = draw(env, env_key, num_rows, local_lane_ids(replicas, num_lanes))
        uniforms = _uniforms(explore_key, num_rows, num_lanes, replicas)
        params = state.learner.params

        def row(actor: ActorState, inputs: tuple) -> tuple[ActorState, tuple[Row, RowReport]]:
            draws, uniform, exploration = inputs
            view = actor.view
            actor, new_row, report, _ = act(env, agent, params, actor, draws, uniform, exploration)
            return actor, (new_row._replace(obs=view), report)

        actor, (rows, reports) = jax.lax.scan(row, state.actor, (draws, uniforms, plan.exploration))
        last_value = jnp.max(agent.q_values(params, actor.view), axis=-1)
        batch = regression(rows, reports.q_max, last_value, config)
        learner_state, losses = learn_from_rollout(learner, state.learner, batch, shuffle_key, config, replicas)
        return FusedState(learner_state, actor, (), key), reports, losses

    return iteration


def _uniforms(key: Array, num_rows: int, num_lanes: int, replicas: Replicas) -> Array:
    """Returns this replica's share of the random numbers for exploration, `[rows, lanes]`."""
    uniforms = jax.random.uniform(key, (num_rows, num_lanes * replicas.size))
    return jax.lax.dynamic_slice_in_dim(uniforms, replicas.rank() * jnp.uint32(num_lanes), num_lanes, axis=1)


def _empty_tally() -> Tally:
    zero = jnp.float32(0)
    return Tally(zero, zero, zero, zero, no_losses(), jnp.int32(NO_BAD_STEP))


def _add(tally: Tally, reports: RowReport, losses: Losses, first_row: Array, replicas: Replicas) -> Tally:
    """Returns the tally with one iteration's reports `[rows, lanes]`, which began at the chunk's `first_row`."""
    ended = reports.episode_ended
    num_lanes = ended.shape[1]
    bad_row, bad_lane = jnp.divmod(jnp.argmax(reports.is_bad), num_lanes)
    bad_step = (first_row + bad_row) * (num_lanes * replicas.size) + local_lane_ids(replicas, num_lanes)[bad_lane]
    bad_step = jnp.where(jnp.any(reports.is_bad), bad_step.astype(jnp.int32), NO_BAD_STEP)
    return Tally(
        num_episodes=tally.num_episodes + jnp.sum(ended),
        episode_return=tally.episode_return + jnp.sum(jnp.where(ended, reports.episode_return, 0)),
        episode_steps=tally.episode_steps + jnp.sum(jnp.where(ended, reports.episode_steps, 0)),
        q_max=tally.q_max + jnp.sum(jnp.mean(reports.q_max, axis=1)),
        losses=jax.tree.map(jnp.add, tally.losses, losses),
        bad_step=jnp.minimum(tally.bad_step, bad_step),
    )


def _joined(tally: Tally, replicas: Replicas) -> Tally:
    """Returns the tally of all replicas."""
    num_episodes, episode_return, episode_steps = replicas.sum(tally[:3])
    q_max, losses = replicas.mean((tally.q_max, tally.losses))
    return Tally(num_episodes, episode_return, episode_steps, q_max, losses, jnp.min(replicas.gather(tally.bad_step)))
