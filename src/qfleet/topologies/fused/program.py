"""The pure functions that `qfleet.topologies.fused` compiles into one program: acting and learning on one state.

The docstring of the package has the steps in order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from qfleet.config import AgentConfig, TrainConfig
from qfleet.core.agent import Agent, noise_keys
from qfleet.core.keys import Stream, key_of
from qfleet.core.learner import Learner, LearnerState
from qfleet.core.numbers import Numbers, numbers_of
from qfleet.core.replay import Replay, ReplayState, Row, SavedReplay, make_replay, partition
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import Params, stored_spec
from qfleet.core.updates import Losses, learn_from_replay, learn_from_rollout, no_losses, regression
from qfleet.envs.in_graph import draw_step_keys
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import EpisodeStats, EpisodesUnderWay, make_evaluation
from qfleet.topologies.acting import ActorState, RowStats, act, init_actor
from qfleet.topologies.schedule import Plan, rows_per_iteration

NO_BAD_STEP = np.iinfo(np.int32).max
"""`ProgramStats.bad_step` of a chunk whose numbers are all finite."""


class FusedState(NamedTuple):
    """Everything that the compiled program changes. A checkpoint holds it beside the host's counters."""

    learner: LearnerState
    actor: ActorState
    replay: ReplayState | tuple[()]
    key: Array


class ProgramStats(NamedTuple):
    """Sums over a chunk, `[]` each."""

    num_episodes: Array
    """Episodes that ended."""
    episode_return: Array
    """Their returns."""
    episode_steps: Array
    """Their lengths."""
    q_max: Array
    """Mean over lanes of the greatest value of each observation acted on, summed over rows."""
    losses: Losses
    bad_step: Array
    """int32, the chunk's first non-finite environment step, `row * lanes + lane`; `NO_BAD_STEP` if none."""


Iteration = Callable[[FusedState, Plan], tuple[FusedState, RowStats, Losses]]
"""`iteration(state, plan [rows]) -> state, stats [rows, lanes], losses`."""


class Program(NamedTuple):
    """The pure functions that are compiled, for one seed. Each replica runs them on its share of the lanes."""

    init: Callable[[Array], FusedState]
    """`init(seed) -> state`, from a `[]` uint32."""
    run: Callable[[FusedState, Plan, Array], tuple[FusedState, ProgramStats]]
    """`run(state, plan, num_iterations) -> state, stats`."""
    begin_episodes: Callable[[Array, Array, Array], EpisodesUnderWay]
    """`begin_episodes(seed, evaluation_step, batch) -> episodes`, `eval_episodes` of them. Each seed, evaluation step
    and batch has episodes of its own; the evaluation step is the run's number of environment steps."""
    play_episodes: Callable[
        [Params, Array, Array, Array, EpisodesUnderWay, Array, Array], tuple[EpisodesUnderWay, EpisodeStats]
    ]
    """`play_episodes(params, seed, evaluation_step, batch, episodes, first_step, num_steps) -> episodes, stats` takes
    at most `num_steps` steps further, as `InGraphEvaluation.play` does."""
    replay_leaves: Callable[[ReplayState], Array | tuple[()]]
    """`replay_leaves(replay) -> priorities`, in the form that `SavedReplay` holds."""
    restore_replay: Callable[[SavedReplay], ReplayState]
    """`restore_replay(saved) -> replay`."""


def partition_state(state: FusedState, axis: str) -> Any:
    """Returns how the state's arrays are spread over the replicas along a mesh axis, as `PartitionSpec`s."""
    divided, replicated = cast(Any, PartitionSpec(axis)), cast(Any, PartitionSpec())
    return FusedState(
        learner=jax.tree.map(lambda x: replicated, state.learner),
        actor=jax.tree.map(lambda x: divided, state.actor),
        replay=state.replay and partition(state.replay, axis),
        key=replicated,
    )


def make_program(
    config: TrainConfig,
    env: InGraphEnv,
    agent: Agent,
    learner: Learner,
    replicas: Replicas = ALONE,
    numbers: Numbers | None = None,
) -> Program:
    """Returns the program that trains one learner in `config.topology.num_envs` lanes of `env`.

    The learner, and this program, have these `numbers` in place of those of the config.
    """
    numbers = numbers_of(config.agent) if numbers is None else numbers
    num_lanes = config.topology.num_envs // replicas.size
    has_replay = config.agent.replay != "none"
    spec = stored_spec(env.spec, agent.to_storage_layout)
    make = functools.partial(make_replay, spec, config.agent, config.topology.num_envs, replicas)
    replay = make(carry_size=agent.carry_size, numbers=numbers) if has_replay else None
    iterate = (
        _replay_iteration(env, agent, learner, replay, num_lanes, replicas)
        if replay
        else _rollout_iteration(config.agent, numbers, env, agent, learner, num_lanes, replicas)
    )
    num_rows = rows_per_iteration(config.agent)

    def init(seed: Array) -> FusedState:
        params_key, lanes_key, state_key = jax.random.split(key_of(seed, Stream.TRAINING), 3)
        actor = init_actor(env, agent, lanes_key, local_lane_ids(replicas, num_lanes))
        return FusedState(learner.init(agent.init(params_key)), actor, replay.init() if replay else (), state_key)

    def run(state: FusedState, plan: Plan, num_iterations: Array) -> tuple[FusedState, ProgramStats]:
        def iteration(i: Array, carry: tuple[FusedState, ProgramStats]) -> tuple[FusedState, ProgramStats]:
            state, stats = carry
            state, rows, losses = iterate(state, jax.tree.map(lambda x: x[i], plan))
            return state, _add_iteration(stats, rows, losses, i * num_rows, replicas)

        state, stats = jax.lax.fori_loop(0, num_iterations, iteration, (state, _no_stats()))
        return state, _over_replicas(stats, replicas)

    evaluation = make_evaluation(
        env,
        agent.player,
        config.eval_episodes,
        config.eval_exploration,
        replicas,
        numbers.discount,
    )

    def begin_episodes(seed: Array, evaluation_step: Array, batch: Array) -> EpisodesUnderWay:
        return evaluation.begin(key_of(seed, Stream.EVALUATION, evaluation_step, batch), jnp.uint32(0))

    def play_episodes(
        params: Params, seed: Array, evaluation_step: Array, batch: Array, *further: Any
    ) -> tuple[EpisodesUnderWay, EpisodeStats]:
        key = key_of(seed, Stream.EVALUATION, evaluation_step, batch)
        return evaluation.play(params, key, jnp.uint32(0), *further)

    def replay_leaves(state: ReplayState) -> Array | tuple[()]:
        return replay.leaves(state) if replay else ()

    def restore_replay(saved: SavedReplay) -> ReplayState:
        assert replay is not None
        return replay.restore(saved)

    return Program(init, run, begin_episodes, play_episodes, replay_leaves, restore_replay)


def _replay_iteration(
    env: InGraphEnv, agent: Agent, learner: Learner, replay: Replay, num_lanes: int, replicas: Replicas
) -> Iteration:
    """Returns an iteration that, in each row, acts, stores the row, and takes as many learner steps as planned."""

    def iteration(state: FusedState, plan: Plan) -> tuple[FusedState, RowStats, Losses]:
        num_rows = plan.exploration.size
        key, env_key, explore_key, learn_key = jax.random.split(state.key, 4)
        step_keys = draw_step_keys(env, env_key, num_rows, local_lane_ids(replicas, num_lanes))
        uniforms = _uniforms(explore_key, num_rows, num_lanes, replicas)
        # No second use of `state.key`: this folds `NOISE` into it, a number that is never among those of a split.
        acting_keys = noise_keys(agent, state.key, num_rows, local_lane_ids(replicas, num_lanes))

        def row(carry: tuple, inputs: tuple) -> tuple[Any, RowStats]:
            learner_state, actor, replay_state, losses = carry
            row_step_keys, uniform, row_acting_keys, row_plan, row_learn_key = inputs
            actor, new_row, stats, _ = act(
                env, agent, learner_state.params, actor, row_step_keys, uniform, row_plan.exploration, row_acting_keys
            )
            replay_state = replay.insert(replay_state, new_row)
            learner_state, replay_state, losses = learn_from_replay(
                learner,
                replay,
                (learner_state, replay_state, losses),
                row_learn_key,
                row_plan.importance_exponent,
                row_plan.num_updates,
                replicas,
            )
            return (learner_state, actor, replay_state, losses), stats

        carry = (state.learner, state.actor, state.replay, no_losses())
        inputs = (step_keys, uniforms, acting_keys, plan, jax.random.split(learn_key, num_rows))
        (learner_state, actor, replay_state, losses), stats = jax.lax.scan(row, carry, inputs)
        return FusedState(learner_state, actor, replay_state, key), stats, losses

    return iteration


def _rollout_iteration(
    config: AgentConfig,
    numbers: Numbers,
    env: InGraphEnv,
    agent: Agent,
    learner: Learner,
    num_lanes: int,
    replicas: Replicas,
) -> Iteration:
    """Returns an iteration of one rollout, its lambda-returns, and some epochs of regression on them."""

    def iteration(state: FusedState, plan: Plan) -> tuple[FusedState, RowStats, Losses]:
        num_rows = plan.exploration.size
        key, env_key, explore_key, shuffle_key = jax.random.split(state.key, 4)
        step_keys = draw_step_keys(env, env_key, num_rows, local_lane_ids(replicas, num_lanes))
        uniforms = _uniforms(explore_key, num_rows, num_lanes, replicas)
        # No second use of `state.key`: this folds `NOISE` into it, a number that is never among those of a split.
        acting_keys = noise_keys(agent, state.key, num_rows, local_lane_ids(replicas, num_lanes))
        params = state.learner.params

        def row(actor: ActorState, inputs: tuple) -> tuple[ActorState, tuple[Row, RowStats]]:
            row_step_keys, uniform, row_acting_keys, exploration = inputs
            view = actor.memory.view
            actor, new_row, stats, _ = act(
                env, agent, params, actor, row_step_keys, uniform, exploration, row_acting_keys
            )
            return actor, (new_row._replace(obs=view), stats)

        actor, (rows, stats) = jax.lax.scan(row, state.actor, (step_keys, uniforms, acting_keys, plan.exploration))
        last_value = jnp.max(agent.act_values(params, actor.memory)[0], axis=-1)
        batch = regression(rows, stats.q_max, last_value, config, state.actor.memory.carry, numbers)
        learner_state, losses = learn_from_rollout(learner, state.learner, batch, shuffle_key, config, replicas)
        return FusedState(learner_state, actor, (), key), stats, losses

    return iteration


def _uniforms(key: Array, num_rows: int, num_lanes: int, replicas: Replicas) -> Array:
    """Returns this replica's share of the random numbers for exploration, `[rows, lanes]`."""
    uniforms = jax.random.uniform(key, (num_rows, num_lanes * replicas.size))
    return jax.lax.dynamic_slice_in_dim(uniforms, replicas.rank() * jnp.uint32(num_lanes), num_lanes, axis=1)


def _no_stats() -> ProgramStats:
    zero = jnp.float32(0)
    return ProgramStats(zero, zero, zero, zero, no_losses(), jnp.int32(NO_BAD_STEP))


def _add_iteration(
    stats: ProgramStats, rows: RowStats, losses: Losses, first_row: Array, replicas: Replicas
) -> ProgramStats:
    """Returns the chunk's stats with one iteration's rows `[rows, lanes]`, which began at the chunk's `first_row`."""
    ended = rows.episode_ended
    num_lanes = ended.shape[1]
    bad_row, bad_lane = jnp.divmod(jnp.argmax(rows.is_bad), num_lanes)
    bad_step = (first_row + bad_row) * (num_lanes * replicas.size) + local_lane_ids(replicas, num_lanes)[bad_lane]
    bad_step = jnp.where(jnp.any(rows.is_bad), bad_step.astype(jnp.int32), NO_BAD_STEP)
    return ProgramStats(
        num_episodes=stats.num_episodes + jnp.sum(ended),
        episode_return=stats.episode_return + jnp.sum(jnp.where(ended, rows.episode_return, 0)),
        episode_steps=stats.episode_steps + jnp.sum(jnp.where(ended, rows.episode_steps, 0)),
        q_max=stats.q_max + jnp.sum(jnp.mean(rows.q_max, axis=1)),
        losses=jax.tree.map(jnp.add, stats.losses, losses),
        bad_step=jnp.minimum(stats.bad_step, bad_step),
    )


def _over_replicas(stats: ProgramStats, replicas: Replicas) -> ProgramStats:
    """Returns the stats over all replicas, from each replica's own."""
    num_episodes, episode_return, episode_steps = replicas.sum(
        (stats.num_episodes, stats.episode_return, stats.episode_steps)
    )
    q_max, losses = replicas.mean((stats.q_max, stats.losses))
    return ProgramStats(
        num_episodes, episode_return, episode_steps, q_max, losses, jnp.min(replicas.gather(stats.bad_step))
    )
