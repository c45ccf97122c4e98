"""The measurements of `gpu.py` of the learner alone, the only ones that use more than qfleet's public interface."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from gpu_parts import Result, Sizes, in_turn

import qfleet
from qfleet.config import MeshConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import LearnerState, make_learner, update
from qfleet.core.replay import Replay, ReplayState, Row, make_replay, outcome_of
from qfleet.core.types import Network, Transition, stored_spec
from qfleet.networks import make_network
from qfleet.runtime.cache import enable_compilation_cache
from qfleet.topologies.mesh import Placement

SPEC = qfleet.EnvSpec(
    name="frames", observation_shape=(84, 84), observation_dtype=np.dtype(np.uint8), num_actions=6, frame_stack=4
)
States = tuple[LearnerState, ReplayState]
LANES = 64
CALL_SECONDS = 0.25
"""Approximate time that a timed call should take."""


class Learning(NamedTuple):
    """The functions of a learner that learns from Atari's frames with the Nature network, as published."""

    network: Network
    replay: Replay
    init: Callable[[], LearnerState]
    update: Callable[[LearnerState, Transition], tuple[LearnerState, Any]]


def learner(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields learner steps/s with the replay on the device: one program draws, computes a gradient and applies it."""
    enable_compilation_cache()
    settings = [
        {"replay": replay, "batch_size": batch_size}
        for batch_size in sizes.batch_sizes
        for replay in ("uniform", "prioritised")
    ]
    return in_turn(settings, functools.partial(learner_speed, sizes), until)


def mesh(sizes: Sizes, until: float) -> Iterator[Result]:
    """Yields what a mesh of one device costs."""
    enable_compilation_cache()
    return in_turn([{"batch_size": sizes.batch_sizes[0]}], functools.partial(mesh_cost, sizes), until)


def learner_speed(sizes: Sizes, replay: str, batch_size: int, *, until: float) -> Result:
    """Returns learner steps/s with many steps per call, as topologies take them, and with one step per call."""
    learning = make_learning(sizes, replay, batch_size)
    states = jax.jit(learning.init)(), filled(learning)
    started = time.perf_counter()
    program = learner_steps(learning).lower(*states, jnp.int32(1)).compile()
    compile_seconds = time.perf_counter() - started
    states, _ = timed(program, states, num_calls=2, num_steps=1)  # warms up
    states, seconds = timed(program, states, num_calls=3, num_steps=1)
    num = max(1, round(CALL_SECONDS / (seconds / 3)))
    in_a_loop: list[float] = []
    one_by_one: list[float] = []
    ends_at = min(until, time.monotonic() + sizes.seconds)
    while not in_a_loop or time.monotonic() < ends_at:
        states, seconds = timed(program, states, num_calls=1, num_steps=num)
        in_a_loop.append(seconds / num)
        states, seconds = timed(program, states, num_calls=num, num_steps=1)
        one_by_one.append(seconds / num)
    return {
        "learner_steps_per_second": round(1 / statistics.median(in_a_loop), 1),
        "samples_per_second": round(batch_size / statistics.median(in_a_loop)),
        "by_calls_of_one": round(1 / statistics.median(one_by_one), 1),
        "compile_seconds": round(compile_seconds, 1),
    }


def learner_steps(learning: Learning) -> Any:
    """Returns a jitted function that takes a given number of learner steps, each with a newly drawn batch."""

    def step(i: jax.Array, states: States) -> States:
        learner_state, replay_state = states
        drawn = learning.replay.sample(replay_state, jax.random.fold_in(jax.random.key(1), i), jnp.float32(0.4))
        learner_state, info = learning.update(learner_state, cast(Transition, drawn.transition))
        return learner_state, learning.replay.set_priorities(replay_state, drawn, info.td_error)

    def learn(learner_state: LearnerState, replay_state: ReplayState, num_steps: jax.Array) -> States:
        return jax.lax.fori_loop(0, num_steps, step, (learner_state, replay_state))

    return jax.jit(learn, donate_argnums=(0, 1))


def timed(program: Any, states: States, *, num_calls: int, num_steps: int) -> tuple[States, float]:
    """Returns the states after `num_calls` calls of `num_steps` learner steps each, and the seconds that they took."""
    count = jnp.int32(num_steps)
    started = time.perf_counter()
    for _ in range(num_calls):
        states = program(*states, count)
    jax.block_until_ready(states)
    return states, time.perf_counter() - started


def mesh_cost(sizes: Sizes, batch_size: int, *, until: float) -> Result:
    """Returns the time of learner steps on a mesh of size 1 over that without a mesh: a median of alternating pairs."""
    learning = make_learning(sizes, "uniform", batch_size)
    placement = Placement(MeshConfig(), learning.network)
    batch = jax.jit(lambda state: learning.replay.sample(state, jax.random.key(1), jnp.float32(1)).transition)(
        filled(learning)
    )

    def learn(state: LearnerState, batch: Transition) -> LearnerState:
        return jax.lax.fori_loop(0, 10, lambda _, state: learning.update(state, batch)[0], state)

    specs = placement.partition_learner(jax.eval_shape(learning.init))
    whole = jax.tree.map(lambda _: jax.P(), batch)
    programs = {
        "without": jax.jit(learn, donate_argnums=0),
        "with": placement.jit(learn, (specs, whole), specs, donate_argnums=(0,)),
    }
    states = {name: program(jax.jit(learning.init)(), batch) for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    ends_at = min(until, time.monotonic() + sizes.seconds)
    while len(seconds["with"]) < 3 or time.monotonic() < ends_at:
        for name, program in programs.items():
            started = time.perf_counter()
            states[name] = jax.block_until_ready(program(states[name], batch))
            seconds[name].append(time.perf_counter() - started)
    ratio = statistics.median(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    return {"time_over_that_without_a_mesh": round(ratio, 4), "pairs": len(seconds["with"])}


def make_learning(sizes: Sizes, replay: str, batch_size: int) -> Learning:
    """Returns the functions of learner and replay."""
    settings: dict[str, Any] = {"replay": replay, "batch_size": batch_size, "replay_capacity": sizes.frames}
    config = qfleet.make_config("ale:Pong", "atari_dqn", **settings).agent
    network = make_network(SPEC, config)
    agent = make_agent(network, config)
    functions = make_learner(agent, config)
    return Learning(
        network=network,
        replay=make_replay(stored_spec(SPEC, network.to_storage_layout), config, LANES),
        init=lambda: functions.init(agent.init(jax.random.key(0))),
        update=functools.partial(update, functions),
    )


def filled(learning: Learning) -> ReplayState:
    """Returns a full replay of random frames, with episodes of about a hundred steps."""
    like = jax.eval_shape(learning.replay.init).ring.rows
    num_rows, shape = like.obs.shape[0], like.obs.shape[1:]
    never = jnp.zeros(LANES, bool)

    def insert(i: jax.Array, state: ReplayState) -> ReplayState:
        key = jax.random.fold_in(jax.random.key(2), i)
        obs = jax.random.bits(key, shape, jnp.uint8)
        action = jax.random.randint(key, (LANES,), 0, SPEC.num_actions)
        terminated = jax.random.uniform(key, (LANES,)) < 0.01
        row = Row(obs, action, jnp.ones(LANES), outcome_of(terminated, never, never))
        return learning.replay.insert(state, row)

    fill = jax.jit(lambda: jax.lax.fori_loop(0, num_rows, insert, learning.replay.init()))
    return jax.block_until_ready(fill())
