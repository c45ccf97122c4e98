"""The overlapped topology: in lock step it is the fused one, and what fails or overlaps teaches nothing wrong."""

import functools

import jax
import numpy as np
import probes
import pytest

from qfleet.config import AgentConfig, FusedConfig, OverlappedConfig, TrainConfig
from qfleet.envs.host import HostEnv, HostStep
from qfleet.envs.in_graph import draw, init_lanes, step_lanes
from qfleet.topologies.fused import Fused
from qfleet.topologies.overlapped import Overlapped
from qfleet.topologies.plan import rows_per_iteration

NUM_ENVS = 4
ROWS = 16

AGENTS = {
    "pqn": AgentConfig(replay="none", rollout_length=ROWS, num_minibatches=4, exploration_env_steps=1000),
    "uniform": AgentConfig(batch_size=16, replay_capacity=300, warmup_env_steps=150, env_steps_per_learner_step=6),
    "prioritised": AgentConfig(
        replay="prioritised",
        n_step=3,
        double=True,
        batch_size=16,
        replay_capacity=300,
        warmup_env_steps=50,
        env_steps_per_learner_step=2.5,
    ),
}


class InGraphLanes:
    """An environment written in JAX, stepped from outside, with the random numbers that the fused program gives it."""

    def __init__(self, env, num_lanes, num_rows, seed):
        self._env, self._num_lanes, self._num_rows = env, num_lanes, num_rows
        _, lanes_key, self._key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
        self._lanes = jax.jit(lambda key: init_lanes(env, key, num_lanes))(lanes_key)
        self._draw = jax.jit(lambda key: draw(env, key, num_rows, num_lanes))
        self._step = jax.jit(functools.partial(step_lanes, env))
        self._row = 0

    def reset(self, seed):
        return np.array(self._lanes.observation)

    def send(self, action):
        i = self._row % self._num_rows
        if i == 0:
            self._key, env_key, _, _ = jax.random.split(self._key, 4)
            self._draws = self._draw(env_key)
        self._row += 1
        self._lanes, self._result = self._step(self._lanes, action, jax.tree.map(lambda x: x[i], self._draws))

    def recv(self):
        nobody = np.zeros(self._num_lanes, bool)
        return HostStep(np.array(self._lanes.observation), *map(np.array, self._result), failed=nobody)

    def close(self):
        pass


def config_of(kind, topology, seed=3, **settings):
    return TrainConfig(env="test", agent=AGENTS[kind], topology=topology, seed=seed, eval_episodes=5, **settings)


def make_overlapped(kind, env, lock_step=True, seed=3):
    config = config_of(kind, OverlappedConfig(num_envs=NUM_ENVS, lock_step=lock_step), seed)

    def make_lanes(num_lanes, options):
        return InGraphLanes(env, num_lanes, rows_per_iteration(config.agent), seed)

    overlapped = Overlapped(config, HostEnv(env.spec, make_lanes, make_lanes), probes.linear_network(env.spec))
    overlapped.start()
    return overlapped


def advance(topology, env_steps):
    records = []
    while topology.env_steps < env_steps:
        records.append(topology.advance(env_steps))
    return records


@pytest.mark.parametrize("kind", AGENTS)
def test_in_lock_step_it_takes_the_steps_of_the_fused_topology(kind):
    env = probes.random_walk(frame_stack=2)
    fused = Fused(config_of(kind, FusedConfig(num_envs=NUM_ENVS)), env, probes.linear_network(env.spec))
    fused.start()
    overlapped = make_overlapped(kind, env)
    steps = 10 * NUM_ENVS * ROWS
    records = {name: advance(each, steps) for name, each in {"fused": fused, "overlapped": overlapped}.items()}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), fused.params, overlapped.params)
    assert fused.counters == overlapped.counters
    episodes = {name: sum(record.num_episodes for record in each) for name, each in records.items()}
    assert episodes["fused"] == episodes["overlapped"] > 10
    if kind != "pqn":
        for mine, other in zip(
            jax.tree.leaves(fused.state["replay"]), jax.tree.leaves(overlapped.state["replay"]), strict=True
        ):
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", AGENTS)
def test_lock_step_is_deterministic(kind):
    first, second = (make_overlapped(kind, probes.random_walk(frame_stack=2)) for _ in range(2))
    for each in (first, second):
        advance(each, 400)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
