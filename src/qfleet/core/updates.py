"""Rounds of learning, for every topology: some learner steps from a replay, or some epochs over a rollout."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core import targets
from qfleet.core.keys import NOISE
from qfleet.core.learner import Learner, LearnerState, UpdateInfo, update
from qfleet.core.normalisation import rewards_of_rollout
from qfleet.core.numbers import Numbers, numbers_of
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, Replay, ReplayState, Row
from qfleet.core.replay.priorities import SumTree
from qfleet.core.replicas import ALONE, Replicas
from qfleet.core.types import Regression


class Losses(NamedTuple):
    """Sums over learner steps, `[]` float32."""

    loss: Array
    td_error: Array
    """Sum of the mean absolute TD error of each batch."""


class EpochKeys(NamedTuple):
    """The keys of each epoch over a rollout, `[epochs]`."""

    shuffle: Array
    noise: Array


def make_epoch_keys(key: Array, num_epochs: int) -> EpochKeys:
    """Returns the keys of a rollout's epochs."""
    return EpochKeys(*(jax.random.split(each, num_epochs) for each in (key, jax.random.fold_in(key, NOISE))))


def no_losses() -> Losses:
    """Returns the sums over no step: zeros."""
    return Losses(jnp.float32(0), jnp.float32(0))


def learn_from_replay(
    learner: Learner,
    replay: Replay,
    state: tuple[LearnerState, ReplayState, Losses],
    key: Array,
    importance_exponent: Array,
    num_updates: Array,
    replicas: Replicas = ALONE,
) -> tuple[LearnerState, ReplayState, Losses]:
    """Takes `num_updates` learner steps, each on a new batch, and sets the priorities of each batch.

    Args:
      learner: the learner.
      replay: the replay. It must hold at least one transition with all its `n_step` rows, unless `num_updates` is 0.
      state: the states of the learner and the replay, and the losses so far.
      key: the key of this round.
      importance_exponent: `[]` float32, beta of prioritised replay.
      num_updates: `[]` int32.
      replicas: replicas that each learn from their share of every batch. The losses are those of this replica's shares.

    Returns:
      The new states of the learner and the replay, and the losses with those of these steps added.
    """
    noise_key = jax.random.fold_in(key, NOISE)
    is_prioritised = isinstance(state[1].tree, SumTree)

    def learn(i: Array, carry: tuple) -> tuple:
        learner_state, replay_state, losses = carry
        sample = replay.sample(replay_state, jax.random.fold_in(key, i), importance_exponent)
        learner_state, info = update(
            learner,
            learner_state,
            sample.transition,
            jax.random.fold_in(noise_key, i),
            replicas,
            gathers_priorities=is_prioritised,
        )
        return learner_state, replay.set_priorities(replay_state, sample, info.priority), add_losses(losses, info)

    return jax.lax.fori_loop(0, num_updates, learn, state)


def learn_from_rollout(
    learner: Learner,
    state: LearnerState,
    batch: Regression,
    key: Array,
    config: AgentConfig,
    replicas: Replicas = ALONE,
) -> tuple[LearnerState, Losses]:
    """Learns from a rollout by regression, for some epochs. Each epoch shuffles the minibatches again.

    Args:
      learner: the learner.
      state: the state of the learner.
      batch: `[rows, lanes, ...]`, the lanes of this replica.
      key: the key of this round.
      config: the number of epochs and minibatches.
      replicas: replicas that each learn from their share of every minibatch. The losses are those of this replica's
        shares.

    Returns:
      The new state of the learner, and the losses of these steps.

    Source: Gallici et al. 2024, arXiv 2407.04811, algorithm 1.
    """

    def epoch(carry: tuple, keys: EpochKeys) -> tuple:
        learner_state, losses = carry
        batches = cut_rollout(batch, keys.shuffle, config.num_minibatches, replicas)
        return learn_from_minibatches(learner, learner_state, losses, batches, keys.noise, replicas), None

    (state, losses), _ = jax.lax.scan(epoch, (state, no_losses()), make_epoch_keys(key, config.num_epochs))
    return state, losses


def learn_from_minibatches(
    learner: Learner, state: LearnerState, losses: Losses, batches: Regression, key: Array, replicas: Replicas = ALONE
) -> tuple[LearnerState, Losses]:
    """Takes one learner step on each minibatch of `batches`, `[minibatches, samples, ...]`, and adds up the losses.

    The learner draws its noise, if it has any, from `key`.
    """

    def step(carry: tuple, inputs: tuple[Regression, Array]) -> tuple:
        learner_state, losses = carry
        minibatch, key = inputs
        learner_state, info = update(learner, learner_state, minibatch, key, replicas)
        return (learner_state, add_losses(losses, info)), None

    (state, losses), _ = jax.lax.scan(step, (state, losses), (batches, jax.random.split(key, len(batches.action))))
    return state, losses


def regression(
    rows: Row,
    q_max: Array,
    last_value: Array,
    config: AgentConfig,
    carry: Any = (),
    numbers: Numbers | None = None,
) -> Regression:
    """Returns a rollout, `[rows, lanes, ...]`, with its lambda-returns as targets.

    Args:
      rows: `[rows, lanes, ...]`. Their `obs` is what the agent saw, with frames stacked.
      q_max: `[rows, lanes]`, the greatest action value of each row's observation.
      last_value: `[lanes]`, the greatest action value of the observation after the last row.
      config: the discount and the decay of traces.
      carry: `[lanes, size]`, what a recurrent network remembered before the first row, where an episode may start:
        then it is zeros.
      numbers: replace those of `config`.
    """
    numbers = numbers_of(config) if numbers is None else numbers
    discount = jnp.where(rows.outcome == TERMINATED, 0.0, numbers.discount)
    returns = targets.lambda_returns(
        r_t=rows.reward,
        discount_t=discount,
        v_t=jnp.concatenate([q_max[1:], last_value[None]]),
        # The row after a truncated step holds the final observation. The return bootstraps there and looks no further.
        lambda_t=jnp.where(rows.outcome == CONTINUED, numbers.trace_decay, 0.0),
    )
    is_step = rows.outcome != NO_STEP
    more = rewards_of_rollout(rows.reward, discount, config)
    batch = Regression(rows.obs, rows.action, returns, weight=is_step.astype(jnp.float32), **more)
    if isinstance(carry, tuple):
        return batch
    is_first = jnp.concatenate([jnp.zeros_like(is_step[:1]), ~is_step[:-1]])
    return batch._replace(carry=carry, is_first=is_first)


def lanes_per_group(rollout_length: int, num_minibatches: int) -> int:
    """Returns the least number of lanes whose samples in a rollout divide evenly over the minibatches."""
    return num_minibatches // math.gcd(rollout_length, num_minibatches)


def cut_rollout(batch: Regression, key: Array, num_minibatches: int, replicas: Replicas = ALONE) -> Regression:
    """Returns a rollout in minibatches: of samples, or of whole lanes for a recurrent network."""
    cut = minibatches if isinstance(batch.carry, tuple) else minibatches_of_lanes
    return cut(batch, key, num_minibatches, replicas)


def minibatches(batch: Regression, key: Array, num_minibatches: int, replicas: Replicas = ALONE) -> Regression:
    """Returns a rollout, `[rows, lanes, ...]`, shuffled and cut into minibatches, `[minibatches, samples, ...]`.

    Each minibatch takes the same number of samples from every lane. If the samples of a lane don't divide evenly, it
    takes the same number from every group of lanes. So the minibatches don't depend on the number of replicas: each
    replica has its part of the minibatches that a single learner would have.

    Within a group of n samples the shuffle is i -> a * i + b modulo n. The random number a is prime to n, and each
    group has its own b. This permutation costs almost nothing, while sorting random keys takes a fifth of a small
    network's iteration on a CPU.
    """
    num_rows, num_lanes = batch.action.shape[:2]
    if num_minibatches == 1:
        return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
    group = lanes_per_group(num_rows, num_minibatches)
    num_groups, num_samples = num_lanes // group, num_rows * group
    # The factors are below 2**32 / num_samples, so a * i can't wrap.
    factors = [a for a in range(1, min(num_samples, 2**32 // num_samples, 4096)) if math.gcd(a, num_samples) == 1]
    bits = jax.random.bits(key, (3,), jnp.uint32)
    groups = jnp.arange(num_groups, dtype=jnp.uint32)
    shifts = (bits[1] + bits[2] * (groups + replicas.rank() * jnp.uint32(num_groups))) % num_samples
    factor = jnp.array(factors, jnp.uint32)[bits[0] % len(factors)]
    order = jnp.arange(num_samples, dtype=jnp.uint32).reshape(num_minibatches, 1, -1) * factor % num_samples
    place = (order + shifts[:, None]) % num_samples  # [minibatches, groups, samples of one group]
    sample = place // group * num_lanes + groups[:, None] * group + place % group
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    return jax.tree.map(lambda x: x.at[sample.reshape(num_minibatches, -1)].get(mode="promise_in_bounds"), flat)


def minibatches_of_lanes(batch: Regression, key: Array, num_minibatches: int, replicas: Replicas = ALONE) -> Regression:
    """Returns a rollout of a recurrent network cut into minibatches, `[minibatches, rows, lanes, ...]`.

    Each lane is in one of them, with all of its rows. A minibatch takes one lane of every `num_minibatches`
    neighbours, by the shuffle of `minibatches`.
    """
    rows, carry = batch._replace(carry=()), batch.carry
    lanes = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1)[None], rows)._replace(carry=carry[None])
    shuffled = minibatches(lanes, key, num_minibatches, replicas)
    rows, carry = shuffled._replace(carry=()), shuffled.carry
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), rows)._replace(carry=carry)


def add_losses(losses: Losses, info: UpdateInfo) -> Losses:
    """Returns the sums with the losses of one more learner step."""
    return Losses(losses.loss + info.loss, losses.td_error + jnp.mean(jnp.abs(info.td_error)))
