"""How close the fused program is to its limit, the time of the forward and backward passes that it can't do without.

    python benchmarks/limit.py

Each setting has one row. It shows microseconds per iteration of the whole program (environment, acting, replay,
sampling, optimiser, bookkeeping) and of its passes alone, and their ratio. The passes alone are the same number of
forward and backward passes, of the same shapes, on ready arrays in one compiled loop. The repeats of both alternate, so
that a noisy machine affects both alike, and medians are shown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from qfleet import InGraphEnv, TrainConfig, make_config, make_env
from qfleet.core.agent import Agent, make_agent, noise_keys
from qfleet.core.learner import draws_of_step, make_learner
from qfleet.core.types import Batch, EnvSpec, Regression, Transition
from qfleet.networks import check_network, make_network
from qfleet.runtime.devices import limit_cpu_threads
from qfleet.topologies.fused.topology import MAX_ITERATIONS, Fused
from qfleet.topologies.schedule import rows_per_iteration

SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CartPole pqn": ("CartPole-v1", "pqn", {}),
    "CartPole double_dqn": ("CartPole-v1", "double_dqn", {}),
    "CartPole rainbow_lite": ("CartPole-v1", "rainbow_lite", {}),
    "Breakout-MinAtar pqn": ("gymnax:Breakout-MinAtar", "pqn", {}),
    "Breakout-MinAtar pqn, convolutional": (
        "gymnax:Breakout-MinAtar",
        "pqn",
        {"torso": "minatar", "hidden_sizes": (128,)},
    ),
    "Breakout-MinAtar double_dqn": ("gymnax:Breakout-MinAtar", "double_dqn", {}),
    "Breakout-MinAtar rainbow": ("gymnax:Breakout-MinAtar", "rainbow", {}),
    "Breakout-MinAtar iqn": ("gymnax:Breakout-MinAtar", "iqn", {}),
}


def main() -> None:
    """Prints the table. Each setting is measured in a process of its own, as if it were a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="measure only settings whose name contains this")
    parser.add_argument("--measure", choices=SETTINGS, help="measure this setting in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        env, preset, settings = SETTINGS[arguments.measure]
        print(json.dumps(measure(make_config(env, preset, **settings), arguments.repeats)))
        return
    results = []
    for name in SETTINGS:
        if arguments.only in name:
            command = [sys.executable, __file__, "--measure", name, "--repeats", str(arguments.repeats)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append({"setting": name, **json.loads(output)})
    common.report("limit", results)


def measure(config: TrainConfig, repeats: int) -> dict[str, float]:
    """Returns microseconds per iteration of both programs, and environment steps/s of the whole one."""
    env = make_env(config.env)
    assert isinstance(env, InGraphEnv)
    network = make_network(env.spec, config.agent)
    limit_cpu_threads(check_network(network, env.spec))
    fused = Fused(config.with_schedule_lengths(), env, network)
    fused.start()
    while fused.learner_steps == 0:  # warms up the replay and the machine
        fused.advance(fused.env_steps + fused.env_steps_per_iteration)
    fused.advance(fused.env_steps + MAX_ITERATIONS * fused.env_steps_per_iteration)

    agent = make_agent(network, config.agent)
    params = jax.tree.map(jnp.copy, fused.params)
    num_iterations = 2
    passes = jax.jit(lambda params, n: passes_alone(config, agent, env.spec, params, n))
    jax.block_until_ready(passes(params, num_iterations))

    whole_us, passes_us = [], []
    for _ in range(repeats):
        before = fused.env_steps
        progress = fused.advance(fused.env_steps + MAX_ITERATIONS * fused.env_steps_per_iteration)
        num_iterations = (progress.env_steps - before) // fused.env_steps_per_iteration
        whole_us.append(1e6 * progress.train_seconds / num_iterations)
        started = time.perf_counter()
        jax.block_until_ready(passes(params, num_iterations))
        passes_us.append(1e6 * (time.perf_counter() - started) / num_iterations)
    whole, alone = statistics.median(whole_us), statistics.median(passes_us)
    return {
        "whole_us": whole,
        "passes_us": alone,
        "ratio": statistics.median(a / b for a, b in zip(whole_us, passes_us, strict=True)),
        "env_steps_per_second": 1e6 * fused.env_steps_per_iteration / whole,
    }


def passes_alone(config: TrainConfig, agent: Agent, spec: EnvSpec, params: object, num_iterations: int) -> object:
    """Runs the passes of some iterations. Each depends on the one before, so that the compiler can't leave any out."""
    num_rows, num_lanes = rows_per_iteration(config.agent), config.topology.num_envs
    is_rollout = config.agent.replay == "none"
    batch_size = num_rows * num_lanes // config.agent.num_minibatches if is_rollout else config.agent.batch_size
    updates_per_row = num_lanes / config.agent.env_steps_per_learner_step
    num_updates = (
        config.agent.num_epochs * config.agent.num_minibatches if is_rollout else round(updates_per_row * num_rows)
    )
    rng = np.random.default_rng(0)

    def ready(*shape: int) -> jax.Array:
        sample = rng.random((*shape, *spec.agent_observation_shape))
        # If all values were alike, the compiler would fold them into the program and leave out the passes over them.
        is_bool = spec.observation_dtype.kind == "b"
        return jnp.asarray(sample < 0.1 if is_bool else sample.astype(spec.observation_dtype))

    views = ready(num_rows + is_rollout, num_lanes)
    # There are several batches, because with one the target network's pass would be constant and moved out of the loop.
    batches = ready_batches(is_rollout, 8, batch_size, spec, rng, ready)
    target_params = jax.tree.map(lambda x: x * 0.9, params)
    learner = make_learner(agent, config.agent)

    def act(total: jax.Array, inputs: tuple, params: object) -> jax.Array:
        return total + jnp.max(agent.q_values(params, *inputs))

    def iteration(number: jax.Array, carry: tuple) -> tuple:
        params, total = carry
        key = jax.random.fold_in(jax.random.key(0), number)
        keys = noise_keys(agent, key, len(views), jnp.arange(num_lanes))
        total, _ = jax.lax.scan(lambda total, x: (act(total, x, params), total), total, (views, keys))

        def learn(i: jax.Array, params: object) -> object:
            batch = jax.tree.map(lambda x: x[i % 8], batches)
            draws = draws_of_step(learner, jax.random.fold_in(key, i), batch_size)
            grads = jax.grad(lambda p: agent.loss(p, target_params, batch, draws)[0])(params)
            return jax.tree.map(lambda p, g: p - 1e-9 * g, params, grads)

        return jax.lax.fori_loop(0, num_updates, learn, params), total

    return jax.lax.fori_loop(0, num_iterations, iteration, (params, jnp.float32(0)))


def ready_batches(
    is_rollout: bool, num: int, size: int, spec: EnvSpec, rng: np.random.Generator, ready: Callable[..., jax.Array]
) -> Batch:
    """Returns batches of random numbers, `[num, size, ...]`."""
    action = jnp.asarray(rng.integers(0, spec.num_actions, (num, size)), jnp.int32)
    number = jnp.asarray(rng.random((num, size)), jnp.float32)
    if is_rollout:
        return Regression(ready(num, size), action, number, number)
    return Transition(ready(num, size), action, number, number, ready(num, size), number)


if __name__ == "__main__":
    main()
