"""The program that `qfleet.topologies.fused` compiles: acting and learning as pure functions of one state."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig, TrainConfig
from qfleet.core import targets
from qfleet.core.actor import init_view, push_frame
from qfleet.core.agent import Agent
from qfleet.core.learner import Learner, LearnerState, UpdateInfo, update
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, Replay, ReplayState, Row, make_replay, outcome_of
from qfleet.core.types import Params, Regression
from qfleet.envs.in_graph import Draws, Lanes, draw, init_lanes, step_lanes
from qfleet.envs.spec import InGraphEnv
from qfleet.runtime.evaluation import greedy_returns

ROWS_PER_ITERATION = 16
"""Rows of one iteration with replay: their random numbers are drawn at once, which is cheaper than one by one."""


# What a seed's random numbers are for: evaluation must not see training's.
_TRAINING, _EVALUATION = 0, 1


class ActorState(NamedTuple):
    """The lanes, and what their agent keeps of them."""

    lanes: Lanes
    view: Array
    """`[lanes, *agent_observation_shape]`, what the agent sees of `lanes.observation`."""
    episode_return: Array
    """`[lanes]` float32, undiscounted, of the episode under way."""


class FusedState(NamedTuple):
    """Everything that the compiled program changes; a checkpoint holds it, and the host's counters."""

    learner: LearnerState
    actor: ActorState
    replay: ReplayState | tuple[()]
    key: Array


class Plan(NamedTuple):
    """What the host decides ahead for each row of a chunk. `[iterations, rows]`."""

    exploration: Array | np.ndarray
    """float32, epsilon or temperature."""
    importance_exponent: Array | np.ndarray
    """float32, beta of prioritised replay."""
    num_updates: Array | np.ndarray
    """int32, learner steps after the row. Q(lambda) learns after each rollout instead."""


class RowReport(NamedTuple):
    """What one row tells of itself. `[lanes]`, and `[rows, lanes]` of an iteration."""

    episode_ended: Array
    episode_return: Array
    episode_steps: Array
    q_max: Array
    is_bad: Array
    """bool, the reward or the next observation isn't finite."""


class Losses(NamedTuple):
    """Sums over learner steps, `[]` float32."""

    loss: Array
    td_error: Array
    """Of each batch's mean absolute TD error."""


class Tally(NamedTuple):
    """Sums over a chunk, `[]` each."""

    num_episodes: Array
    episode_return: Array
    episode_steps: Array
    q_max: Array
    """Of each row's mean over lanes."""
    losses: Losses
    bad_step: Array
    """int32, the chunk's first non-finite environment step, `row * lanes + lane`; -1 if none."""


Iteration = Callable[[FusedState, Plan], tuple[FusedState, RowReport, Losses]]
"""`iteration(state, plan [rows]) -> state, reports [rows, lanes], losses`."""


class Program(NamedTuple):
    """The pure functions that are compiled, for one seed."""

    init: Callable[[Array], FusedState]
    """`init(seed) -> state`, from a `[]` uint32."""
    run: Callable[[FusedState, Plan, Array], tuple[FusedState, Tally]]
    """`run(state, plan, num_iterations) -> state, tally`."""
    evaluate: Callable[[Params, Array, Array, Array], Array]
    """`evaluate(params, seed, moment, batch) -> returns`, of `eval_episodes` greedy episodes: others for each seed,
    moment of the run and batch."""


def make_program(config: TrainConfig, env: InGraphEnv, agent: Agent, learner: Learner) -> Program:
    """Returns the program that trains one learner in `config.topology.num_envs` lanes of `env`."""
    num_lanes = config.topology.num_envs
    replay = make_replay(env.spec, config.agent, num_lanes) if config.agent.replay != "none" else None
    iterate = (
        _replay_iteration(config, env, agent, learner, replay)
        if replay
        else _rollout_iteration(config, env, agent, learner)
    )
    num_rows = rows_per_iteration(config.agent)

    def init(seed: Array) -> FusedState:
        params_key, lanes_key, state_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), _TRAINING), 3)
        lanes = init_lanes(env, lanes_key, num_lanes)
        actor = ActorState(lanes, init_view(lanes.observation, env.spec.frame_stack), jnp.zeros(num_lanes))
        return FusedState(learner.init(agent.init(params_key)), actor, replay.init() if replay else (), state_key)

    def run(state: FusedState, plan: Plan, num_iterations: Array) -> tuple[FusedState, Tally]:
        def iteration(i: Array, carry: tuple[FusedState, Tally]) -> tuple[FusedState, Tally]:
            state, tally = carry
            state, reports, losses = iterate(state, jax.tree.map(lambda x: x[i], plan))
            return state, _add(tally, reports, losses, first_step=i * num_rows * num_lanes)

        return jax.lax.fori_loop(0, num_iterations, iteration, (state, _empty_tally()))

    def evaluate(params: Params, seed: Array, moment: Array, batch: Array) -> Array:
        key = jax.random.key(seed)
        for number in (_EVALUATION, moment, batch):
            key = jax.random.fold_in(key, number)
        return greedy_returns(env, agent.q_values, params, key, config.eval_episodes)

    return Program(init, run, evaluate)


def rows_per_iteration(config: AgentConfig) -> int:
    """Returns how many steps each lane takes in one iteration, the unit in which runs stop."""
    return config.rollout_length if config.replay == "none" else ROWS_PER_ITERATION


def _replay_iteration(
    config: TrainConfig, env: InGraphEnv, agent: Agent, learner: Learner, replay: Replay
) -> Iteration:
    """Each row: act, insert, and as many learner steps as planned."""

    def iteration(state: FusedState, plan: Plan) -> tuple[FusedState, RowReport, Losses]:
        num_rows = plan.exploration.size
        key, env_key, explore_key, learn_key = jax.random.split(state.key, 4)
        draws = draw(env, env_key, num_rows, config.topology.num_envs)
        uniforms = jax.random.uniform(explore_key, (num_rows, config.topology.num_envs))

        def row(carry: tuple, inputs: tuple) -> tuple[Any, RowReport]:
            learner_state, actor, replay_state, losses = carry
            draws, uniform, plan, learn_key = inputs
            actor, new_row, report = _act(env, agent, learner_state.params, actor, draws, uniform, plan.exploration)

            def learn(i: Array, carry: tuple) -> tuple:
                learner_state, replay_state, losses = carry
                sample = replay.sample(replay_state, jax.random.fold_in(learn_key, i), plan.importance_exponent)
                learner_state, info = update(learner, learner_state, sample.transition)
                replay_state = replay.set_priorities(replay_state, sample, info.td_error)
                return learner_state, replay_state, _add_losses(losses, info)

            carry = (learner_state, replay.insert(replay_state, new_row), losses)
            learner_state, replay_state, losses = jax.lax.fori_loop(0, plan.num_updates, learn, carry)
            return (learner_state, actor, replay_state, losses), report

        carry = (state.learner, state.actor, state.replay, _no_losses())
        inputs = (draws, uniforms, plan, jax.random.split(learn_key, num_rows))
        (learner_state, actor, replay_state, losses), reports = jax.lax.scan(row, carry, inputs)
        return FusedState(learner_state, actor, replay_state, key), reports, losses

    return iteration


def _rollout_iteration(config: TrainConfig, env: InGraphEnv, agent: Agent, learner: Learner) -> Iteration:
    """One rollout of all lanes, its lambda-returns, and some epochs of regression on them.

    Source: Gallici et al. 2024, arXiv 2407.04811, algorithm 1.
    """

    def iteration(state: FusedState, plan: Plan) -> tuple[FusedState, RowReport, Losses]:
        num_rows = plan.exploration.size
        key, env_key, explore_key, shuffle_key = jax.random.split(state.key, 4)
        draws = draw(env, env_key, num_rows, config.topology.num_envs)
        uniforms = jax.random.uniform(explore_key, (num_rows, config.topology.num_envs))
        params = state.learner.params

        def row(actor: ActorState, inputs: tuple) -> tuple[ActorState, tuple[Row, RowReport]]:
            draws, uniform, exploration = inputs
            view = actor.view
            actor, new_row, report = _act(env, agent, params, actor, draws, uniform, exploration)
            return actor, (new_row._replace(obs=view), report)

        actor, (rows, reports) = jax.lax.scan(row, state.actor, (draws, uniforms, plan.exploration))
        last_value = jnp.max(agent.q_values(params, actor.view), axis=-1)
        batch = _regression(rows, reports.q_max, last_value, config.agent)

        def step(carry: tuple, minibatch: Regression) -> tuple:
            learner_state, losses = carry
            learner_state, info = update(learner, learner_state, minibatch)
            return (learner_state, _add_losses(losses, info)), None

        def epoch(carry: tuple, key: Array) -> tuple:
            return jax.lax.scan(step, carry, _minibatches(batch, key, config.agent.num_minibatches))

        epoch_keys = jax.random.split(shuffle_key, config.agent.num_epochs)
        (learner_state, losses), _ = jax.lax.scan(epoch, (state.learner, _no_losses()), epoch_keys)
        return FusedState(learner_state, actor, (), key), reports, losses

    return iteration


def _act(
    env: InGraphEnv, agent: Agent, params: Params, actor: ActorState, draws: Draws, uniform: Array, exploration: Array
) -> tuple[ActorState, Row, RowReport]:
    """One step of all lanes: returns the actor after it, the row that it made, and its report."""
    lanes_tm1 = actor.lanes
    q = agent.q_values(params, actor.view)
    action = agent.explore(q, exploration, uniform)
    lanes, step = step_lanes(env, lanes_tm1, action, draws)
    row = Row(lanes_tm1.observation, action, step.reward, outcome_of(step.terminated, step.truncated, lanes_tm1.final))
    episode_return = jnp.where(lanes_tm1.final, 0.0, actor.episode_return + step.reward)
    report = RowReport(
        episode_ended=lanes.final,
        episode_return=episode_return,
        episode_steps=lanes.episode_steps,
        q_max=jnp.max(q, axis=-1),
        is_bad=~(jnp.isfinite(step.reward) & _is_finite(lanes.observation)),
    )
    view = push_frame(actor.view, lanes.observation, lanes_tm1.final, env.spec.frame_stack)
    return ActorState(lanes, view, episode_return), row, report


def _is_finite(obs: Array) -> Array:
    """Returns whether each lane's observation is finite: `[lanes, ...]` to `[lanes]` bool."""
    return jnp.all(jnp.isfinite(obs).reshape(obs.shape[0], -1), axis=1)


def _regression(rows: Row, q_max: Array, last_value: Array, config: AgentConfig) -> Regression:
    """Returns a rollout as one batch with its lambda-returns.

    Args:
      rows: `[rows, lanes, ...]`, with what the agent saw as `obs`.
      q_max: `[rows, lanes]`, the greatest value of each row's observation.
      last_value: `[lanes]`, of the observation after the last row.
    """
    returns = targets.lambda_returns(
        r_t=rows.reward,
        discount_t=jnp.where(rows.outcome == TERMINATED, 0.0, config.discount),
        v_t=jnp.concatenate([q_max[1:], last_value[None]]),
        # The row after a truncated step holds its final observation: bootstrap there, and look no further.
        lambda_t=jnp.where(rows.outcome == CONTINUED, config.trace_decay, 0.0),
    )
    batch = Regression(rows.obs, rows.action, returns, weight=(rows.outcome != NO_STEP).astype(jnp.float32))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def _minibatches(batch: Regression, key: Array, num_minibatches: int) -> Regression:
    """Returns the batch shuffled and cut, `[minibatches, samples, ...]`.

    The shuffle is i -> a * i + b modulo the number of samples, with random b and random a prime to it: a permutation
    that costs nothing, where sorting random keys takes a fifth of a small network's iteration on CPU.
    """
    num_samples = batch.action.shape[0]
    if num_minibatches == 1:
        return jax.tree.map(lambda x: x[None], batch)
    # Factors stay below 2**32 / num_samples, so that a * i can't wrap.
    factors = [a for a in range(1, min(num_samples, 2**32 // num_samples, 4096)) if math.gcd(a, num_samples) == 1]
    bits = jax.random.bits(key, (2,), jnp.uint32)
    factor, shift = jnp.array(factors, jnp.uint32)[bits[0] % len(factors)], bits[1] % num_samples
    order = (jnp.arange(num_samples, dtype=jnp.uint32) * factor % num_samples + shift) % num_samples
    shuffled = jax.tree.map(lambda x: x.at[order].get(mode="promise_in_bounds"), batch)
    return jax.tree.map(lambda x: x.reshape(num_minibatches, -1, *x.shape[1:]), shuffled)


def _no_losses() -> Losses:
    return Losses(jnp.float32(0), jnp.float32(0))


def _add_losses(losses: Losses, info: UpdateInfo) -> Losses:
    return Losses(losses.loss + info.loss, losses.td_error + jnp.mean(jnp.abs(info.td_error)))


def _empty_tally() -> Tally:
    zero = jnp.float32(0)
    return Tally(zero, zero, zero, zero, _no_losses(), bad_step=jnp.int32(-1))


def _add(tally: Tally, reports: RowReport, losses: Losses, first_step: Array) -> Tally:
    """Returns the tally with one iteration's reports `[rows, lanes]`, which began at the chunk's `first_step`."""
    ended = reports.episode_ended
    is_bad = reports.is_bad.reshape(-1)
    bad_step = jnp.where(jnp.any(is_bad), first_step + jnp.argmax(is_bad), -1)
    return Tally(
        num_episodes=tally.num_episodes + jnp.sum(ended),
        episode_return=tally.episode_return + jnp.sum(jnp.where(ended, reports.episode_return, 0)),
        episode_steps=tally.episode_steps + jnp.sum(jnp.where(ended, reports.episode_steps, 0)),
        q_max=tally.q_max + jnp.sum(jnp.mean(reports.q_max, axis=1)),
        losses=jax.tree.map(jnp.add, tally.losses, losses),
        bad_step=jnp.where(tally.bad_step >= 0, tally.bad_step, bad_step),
    )
