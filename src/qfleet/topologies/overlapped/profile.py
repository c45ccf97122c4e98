"""The programs of `qfleet.topologies.overlapped` in parts: the same work as in other runs, but each part is timed.

Acting is one program, as in other runs. Learning, which is one program in other runs, is one program for each part
here, and the host runs them in turn. What is learned is the same. The number of the learner step stays on the device,
as in other runs: sending it there for each step would count as a transfer that no other run makes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qfleet.config import AgentConfig
from qfleet.core.keys import NOISE
from qfleet.core.learner import Learner, LearnerState, update
from qfleet.core.replay import Replay, ReplayState, Sample
from qfleet.core.types import Regression, Transition
from qfleet.core.updates import (
    EpochKeys,
    Losses,
    add_losses,
    cut_rollout,
    learn_from_minibatches,
    make_epoch_keys,
    no_losses,
)
from qfleet.envs.host import HostLanes
from qfleet.runtime.stopwatch import Stopwatch
from qfleet.topologies.overlapped.programs import HostRow, Programs


def parts_of(config: AgentConfig) -> tuple[str, ...]:
    """Returns the names of the parts that a row's time is divided into.

    - environment: sending actions to the lanes and waiting for the results.
    - transfer: copies from the host to the device and back.
    - inference: the network's values of the lanes' observations, and choosing actions by them.
    - replay: storing rows, drawing batches (with their frame stacks and n-step returns), setting priorities. Without
      replay this part is `returns` instead: computing the rollout's lambda-returns and dividing it into minibatches.
    - update: computing gradients and applying them to the parameters.
    """
    return ("environment", "transfer", "inference", "returns" if config.replay == "none" else "replay", "update")


class TimedLanes(NamedTuple):
    """Lanes whose steps are timed as part `environment`. Fields are the methods of `HostLanes`."""

    reset: Callable[[int], np.ndarray]
    send: Callable[[np.ndarray], None]
    recv: Callable[[], Any]
    close: Callable[[], None]


def timed_lanes(lanes: HostLanes, stopwatch: Stopwatch) -> TimedLanes:
    """Returns `lanes`, with their steps timed."""
    timed = stopwatch.timed
    return TimedLanes(lanes.reset, timed("environment", lanes.send), timed("environment", lanes.recv), lanes.close)


def timed_act(act: Callable[..., Any], stopwatch: Stopwatch, from_host: tuple[Any, ...]) -> Callable[..., Any]:
    """Returns the compiled `Programs.act`, timed separately from the copies of its arguments to the device.

    Args:
      act: the compiled program.
      stopwatch: takes the times.
      from_host: arguments of `act` from the fourth on, in the shapes that it is called with; they lie on the host.
    """
    put, infer = _timed_put(stopwatch, from_host), stopwatch.timed("inference", act)

    def run(params: Any, memory: Any, obs: Any, *from_host: Any) -> Any:
        return infer(params, memory, obs, *put(from_host))

    return run


def _timed_put(stopwatch: Stopwatch, like: Any) -> Callable[[Any], Any]:
    """Returns a function that copies a program's arguments, in the shapes of `like`, to the device.

    The copy is a program that does nothing else, because other runs copy arguments the same way: when a program is
    dispatched, which takes a tenth of the time of `jax.device_put` for a few small arrays.
    """
    return stopwatch.timed("transfer", _compiled(lambda arguments: arguments, like))


def timed_learn(
    learner: Learner,
    replay: Replay | None,
    programs: Programs,
    config: AgentConfig,
    stopwatch: Stopwatch,
    arguments: tuple[Any, ...],
) -> Callable[..., tuple]:
    """Returns `Programs.learn`, compiled in parts for arguments of these shapes, with each part timed."""
    if replay is None:
        return _timed_learn_without_replay(learner, programs, config, stopwatch, arguments)
    return _timed_learn_with_replay(learner, replay, programs, config, stopwatch, arguments)


def _timed_learn_with_replay(
    learner: Learner,
    replay: Replay,
    programs: Programs,
    config: AgentConfig,
    stopwatch: Stopwatch,
    arguments: tuple[Any, ...],
) -> Callable[..., tuple[LearnerState, ReplayState, Losses]]:
    def sample(state: ReplayState, key: Array, i: Array, importance_exponent: Array) -> tuple[Sample, Array]:
        return replay.sample(state, jax.random.fold_in(key, i), importance_exponent), i + 1

    def step(
        state: LearnerState, losses: Losses, batch: Transition, key: Array, i: Array
    ) -> tuple[LearnerState, Losses, Array]:
        noise_key = jax.random.fold_in(jax.random.fold_in(key, NOISE), i)
        state, info = update(learner, state, batch, noise_key)
        return state, add_losses(losses, info), info.priority

    learner_state, replay_state, row, key, exponent, _ = arguments
    first, from_host = jnp.int32(0), (row._replace(obs=(), carry=()), exponent)
    drawn, _ = jax.eval_shape(sample, replay_state, key, first, exponent)
    _, losses, priority = jax.eval_shape(step, learner_state, no_losses(), drawn.transition, key, first)
    put, timed = _timed_put(stopwatch, from_host), stopwatch.timed
    timed_insert = timed("replay", _compiled(programs.insert, replay_state, row, donated=0))
    timed_sample = timed("replay", _compiled(sample, replay_state, key, first, exponent))
    timed_step = timed("update", _compiled(step, learner_state, losses, drawn.transition, key, first, donated=0))
    set_priorities = _compiled(replay.set_priorities, replay_state, drawn, priority, donated=0)
    timed_set_priorities = timed("replay", set_priorities)

    def learn(
        learner_state: LearnerState,
        replay_state: ReplayState,
        row: HostRow,
        key: Array,
        importance_exponent: Any,
        num_updates: Any,
    ) -> tuple[LearnerState, ReplayState, Losses]:
        rest, exponent = put((row._replace(obs=(), carry=()), importance_exponent))
        row = rest._replace(obs=row.obs, carry=row.carry)
        replay_state, losses, i = timed_insert(replay_state, row), no_losses(), first
        for _ in range(num_updates):
            drawn, following = timed_sample(replay_state, key, i, exponent)
            learner_state, losses, priority = timed_step(learner_state, losses, drawn.transition, key, i)
            if config.replay == "prioritised":
                replay_state = timed_set_priorities(replay_state, drawn, priority)
            i = following
        return learner_state, replay_state, losses

    return learn


def _timed_learn_without_replay(
    learner: Learner, programs: Programs, config: AgentConfig, stopwatch: Stopwatch, arguments: tuple[Any, ...]
) -> Callable[..., tuple[LearnerState, Losses]]:
    def cut(batch: Regression, keys: EpochKeys, i: Array) -> tuple[Regression, Array]:
        return cut_rollout(batch, keys.shuffle[i], config.num_minibatches), i + 1

    def epoch_keys(key: Array) -> EpochKeys:
        return make_epoch_keys(key, config.num_epochs)

    def epoch(
        state: LearnerState, losses: Losses, batches: Regression, keys: EpochKeys, i: Array
    ) -> tuple[LearnerState, Losses]:
        return learn_from_minibatches(learner, state, losses, batches, keys.noise[i])

    state, *rollout, key = arguments
    batch = jax.eval_shape(programs.rollout_batch, state.params, *rollout)
    keys = jax.eval_shape(epoch_keys, key)
    first = jnp.int32(0)
    batches, _ = jax.eval_shape(cut, batch, keys, first)
    put, timed = _timed_put(stopwatch, (rollout[0], rollout[-1])), stopwatch.timed
    timed_batch = timed("returns", _compiled(programs.rollout_batch, state.params, *rollout))
    timed_keys = timed("returns", _compiled(epoch_keys, key))
    timed_cut = timed("returns", _compiled(cut, batch, keys, first))
    timed_epoch = timed("update", _compiled(epoch, state, no_losses(), batches, keys, first, donated=0))

    def learn(state: LearnerState, *arguments: Any) -> tuple[LearnerState, Losses]:
        rows, *on_device, next_is_first, key = arguments
        rows, next_is_first = put((rows, next_is_first))
        batch, keys = timed_batch(state.params, rows, *on_device, next_is_first), timed_keys(key)
        losses, i = no_losses(), first
        for _ in range(config.num_epochs):
            batches, following = timed_cut(batch, keys, i)
            state, losses = timed_epoch(state, losses, batches, keys, i)
            i = following
        return state, losses

    return learn


def _compiled(function: Callable[..., Any], *arguments: Any, donated: int | tuple[()] = ()) -> Callable[..., Any]:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
