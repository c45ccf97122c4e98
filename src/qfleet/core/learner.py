"""A learner: the gradients of a batch, and the step that changes the parameters by them."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qfleet.config import AgentConfig, ConfigError, suggest
from qfleet.config.values import show
from qfleet.core.agent import Agent
from qfleet.core.keys import NOISE, Draws, Stream, key_of, sample_keys
from qfleet.core.normalisation import StatisticsPlace, apply_updates, with_moments, without_statistics
from qfleet.core.numbers import Numbers, numbers_of
from qfleet.core.replicas import ALONE, Replicas, local_lane_ids
from qfleet.core.types import Batch, Params, Sequences

ELEMENTWISE = (
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "lion",
    "radam",
    "rmsprop",
    "sgd",
)
"""Optimisers that treat each parameter alike, whatever array it is in. They may see all parameters as one vector."""

SMALL = 20_000
"""Number of parameters up to which one vector is faster than many small arrays. On a CPU it saves a sixth of a small
network's learner step and a quarter of its compile time. For larger networks, copying costs more than it saves."""


class LearnerState(NamedTuple):
    """Everything that a learner keeps from one step to the next."""

    params: Params
    target_params: Params
    """A copy of earlier `params`, or `()` if learning has no target network."""
    optimiser_state: optax.OptState
    target_age: Array
    """`[]` int32, learner steps since the last update of the target network. It restarts at each update, so it can't
    wrap. The total of learner steps is counted outside the core, in integers without a limit."""


class UpdateInfo(NamedTuple):
    """Measurements of one learner step."""

    loss: Array
    """`[]` float32, the weighted mean over the batch."""
    td_error: Array
    """`[batch]` float32, target minus value, in units of discounted reward."""
    priority: Array
    """`[batch]` float32, for the replay, which takes its absolute value."""
    sample_loss: Array
    """`[batch]` float32, the loss of each sample without its importance weight."""


class Learner(NamedTuple):
    """The pure functions of one learner; a topology decides where each of them runs."""

    init: Callable[[Params], LearnerState]
    """`init(params) -> state`."""
    gradients: Callable[[LearnerState, Batch, Draws | None], tuple[Params, UpdateInfo]]
    """`gradients(state, batch, draws) -> grads, info`. The gradients have the structure of the parameters. `draws` is
    `draws_of_step`."""
    apply: Callable[[LearnerState, Params], LearnerState]
    """`apply(state, grads) -> state`, after one step of the optimiser and, if it is due, of the target network."""
    needs_draws: bool = False
    """Whether `gradients` draws random numbers."""


def make_learner(
    agent: Agent,
    config: AgentConfig,
    optimiser: optax.GradientTransformation | None = None,
    statistics: StatisticsPlace | None = None,
    numbers: Numbers | None = None,
) -> Learner:
    """Returns the learner of `agent`.

    Args:
      agent: the agent.
      config: its config.
      optimiser: replaces the one that `config` names.
      statistics: where the parameters that `apply` changes hold statistics; by default, where the agent's do.
      numbers: replace those of `config`.

    Raises:
      ConfigError: if the optimiser isn't one of Optax, or there is none of that name.
    """
    numbers = numbers_of(config) if numbers is None else numbers
    optimiser = make_optimiser(config, numbers.learning_rate) if optimiser is None else optimiser
    if not (hasattr(optimiser, "init") and hasattr(optimiser, "update")):
        raise ConfigError(
            f"`optimiser` must be an optax.GradientTransformation, got {show(optimiser)}; give one, such as "
            f"optax.adam(1e-3)"
        )
    has_target = config.replay != "none"
    statistics = agent.statistics if statistics is None else statistics

    def init(params: Params) -> LearnerState:
        # This must be a copy, because a donated state must not hold the same buffer twice.
        target_params = jax.tree.map(jnp.copy, params) if has_target else ()
        optimiser_state = optimiser.init(without_statistics(params, statistics))
        return LearnerState(params, target_params, optimiser_state, jnp.zeros((), jnp.int32))

    def gradients(state: LearnerState, batch: Batch, draws: Draws | None = None) -> tuple[Params, UpdateInfo]:
        loss = jax.value_and_grad(agent.loss, has_aux=True)
        (value, found), grads = loss(state.params, state.target_params, batch, draws)
        if agent.statistics is not None:
            assert not isinstance(batch, Sequences)  # which come with a memory
            grads = with_moments(grads, state.params, batch)
        return grads, UpdateInfo(value, found.td_error, found.priority, found.loss)

    def next_target(target: Params, online: Params) -> Params:
        copies, rate = config.target_update_rate == 1.0, numbers.target_update_rate
        return online if copies else jax.tree.map(lambda t, o: t + rate * (o - t), target, online)

    def apply(state: LearnerState, grads: Params) -> LearnerState:
        seen_grads, seen_params = (without_statistics(tree, statistics) for tree in (grads, state.params))
        updates, optimiser_state = optimiser.update(seen_grads, state.optimiser_state, seen_params)
        params = apply_updates(state.params, updates, grads, statistics)
        if not has_target:
            return LearnerState(params, (), optimiser_state, state.target_age)
        age = state.target_age + 1
        is_due = age >= config.target_update_period
        target = state.target_params
        target_params = jax.lax.cond(is_due, lambda: next_target(target, params), lambda: target)
        return LearnerState(params, target_params, optimiser_state, jnp.where(is_due, 0, age))

    return Learner(init, gradients, apply, agent.loss_draws)


def init_from_seed(learner: Learner, agent: Agent, seed: Array) -> LearnerState:
    """Returns the state with which a run with this seed, `[]` uint32, begins. It is the same in every topology."""
    return learner.init(agent.init(jax.random.split(key_of(seed, Stream.TRAINING), 3)[0]))


def update(
    learner: Learner,
    state: LearnerState,
    batch: Batch,
    key: Array | None = None,
    replicas: Replicas = ALONE,
    *,
    gathers_priorities: bool = False,
) -> tuple[LearnerState, UpdateInfo]:
    """Takes one learner step.

    Args:
      learner: the learner.
      state: its state.
      batch: this replica's share of the batch, `[batch / replicas, ...]`.
      key: the key of this step, the same in all replicas. Learners that draw nothing need none.
      replicas: replicas whose gradients are averaged.
      gathers_priorities: whether the priorities in the result are those of the whole batch, which the replicas exchange
        together with their gradients.
    """
    grads, info = learner.gradients(state, batch, draws_of_step(learner, key, batch.action.shape[-1], replicas))
    if not gathers_priorities:
        return learner.apply(state, replicas.mean(grads)), info
    grads, priority = replicas.mean_and_gather(grads, info.priority)
    return learner.apply(state, grads), info._replace(priority=priority)


def draws_of_step(learner: Learner, key: Array | None, batch_size: int, replicas: Replicas = ALONE) -> Draws | None:
    """Returns the `draws` that `Learner.gradients` takes for this replica's share of a batch; None if it needs none.

    Each sample's key, or that of each lane of a rollout, comes from its number in the whole batch, so that replicas
    draw what a single learner does.
    """
    if not learner.needs_draws:
        return None
    assert key is not None
    return Draws(jax.random.fold_in(key, NOISE), sample_keys(key, local_lane_ids(replicas, batch_size)))


def make_optimiser(config: AgentConfig, learning_rate: float | Array | None = None) -> optax.GradientTransformation:
    """Returns gradient clipping followed by the Optax optimiser that `config` names.

    With `learning_rate`, that one is the rate at the first learner step.

    Raises:
      ConfigError: if Optax has no such optimiser, or the optimiser doesn't take these options or values.
    """
    known = _optimisers()
    if config.optimiser not in known:
        raise ConfigError(
            f"optimiser must be one of Optax's, got {config.optimiser!r}.{suggest(config.optimiser, known)}"
        )
    make = known[config.optimiser]
    options = [name for name in _parameters(make) if name != "learning_rate"]  # a setting of its own
    unknown = sorted(set(config.optimiser_options) - set(options))
    if unknown:
        raise ConfigError(
            f"optimiser_options must be arguments of optax.{config.optimiser}, got {', '.join(unknown)}; "
            f"it takes {', '.join(options)}"
        )
    if config.optimiser == "rmsprop" and config.optimiser_options.get("centered"):
        make = _centred_rmsprop
    try:
        optimiser = make(learning_rate=_schedule(config, learning_rate), **config.optimiser_options)
        params = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}  # an array would be made by a program of its own
        jax.eval_shape(lambda params: optimiser.update(params, optimiser.init(params), params), params)
    except Exception as error:  # whatever Optax makes of a value
        raise ConfigError(
            f"optimiser_options must be values that optax.{config.optimiser} can compute with, got "
            f"{dict(config.optimiser_options)} ({type(error).__name__}: {error}); choose other options"
        ) from error
    if config.max_gradient_norm is not None:
        optimiser = optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optimiser)
    return _flattened_if_small(optimiser) if config.optimiser in ELEMENTWISE else optimiser


def _centred_rmsprop(
    learning_rate: float | optax.Schedule,
    *,
    centered: bool,
    momentum: float | None = None,
    nesterov: bool = False,
    **options: Any,
) -> optax.GradientTransformation:
    """Returns `optax.rmsprop(centered=True)` with a variance that is never negative. Its state is the same.

    The variance is the mean square minus the square of the mean. If a gradient hardly changes, both are almost equal.
    Rounding can then make the difference more negative than `eps` is positive, and its root would be NaN.
    """
    del centered
    moments = optax.scale_by_stddev(**options)

    def update(grads: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        _, state = moments.update(grads, state, params)
        mean, mean_square = state.mu, state.nu
        if options.get("bias_correction"):
            decay = options.get("decay", 0.9)
            mean, mean_square = (optax.tree.bias_correction(each, decay, state.count) for each in (mean, mean_square))
        variance = jax.tree.map(lambda m, s: jnp.maximum(s - jnp.square(m), 0.0), mean, mean_square)
        eps = options.get("eps", 1e-8)
        if options.get("eps_in_sqrt", True):
            return jax.tree.map(lambda g, v: g * jax.lax.rsqrt(v + eps), grads, variance), state
        return jax.tree.map(lambda g, v: g / (jnp.sqrt(v) + eps), grads, variance), state

    return optax.chain(
        optax.GradientTransformation(moments.init, update),
        optax.scale_by_learning_rate(learning_rate),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
    )


def _flattened_if_small(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the same optimiser, but it sees the parameters of a small network as one vector."""
    flattened = optax.flatten(optimiser)

    def choose(tree: Params) -> optax.GradientTransformation:
        return flattened if sum(leaf.size for leaf in jax.tree.leaves(tree)) <= SMALL else optimiser

    def init(params: Params) -> optax.OptState:
        return choose(params).init(params)

    def update(grads: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        return choose(grads).update(grads, state, params)

    return optax.GradientTransformation(init, update)


def _optimisers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Returns Optax's optimisers by name, except L-BFGS, whose line search must evaluate the loss itself."""
    functions = {name: vars(optax).get(name) for name in optax.__all__}  # getattr would warn of deprecated names
    return {
        name: function
        for name, function in functions.items()
        if "learning_rate" in _parameters(function) and name not in ("lbfgs", "scale_by_rprop")
    }


def _parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters) if inspect.isfunction(function) else []


def _schedule(config: AgentConfig, learning_rate: float | Array | None) -> Any:
    """Returns the learning rate as Optax takes it: a number, or a function of the learner step."""
    start = config.learning_rate if learning_rate is None else learning_rate
    end_fraction = config.learning_rate_end_fraction
    num_steps = config.learning_rate_learner_steps
    if config.learning_rate_schedule == "constant":
        return start
    if num_steps is None:
        raise ValueError("learning_rate_learner_steps must be a number once a run has begun, got None")
    match config.learning_rate_schedule:
        case "linear":
            return optax.linear_schedule(start, start * end_fraction, num_steps)
        case "cosine":
            return optax.cosine_decay_schedule(start, num_steps, end_fraction)
        case "exponential":
            return optax.exponential_decay(start, num_steps, end_fraction, end_value=start * end_fraction)
