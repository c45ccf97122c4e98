"""Meshes of devices: whatever their shape, what is learned is what one device learns, up to rounding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import P

from qfleet.config import AgentConfig, ConfigError, FusedConfig, MeshConfig, TrainConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, update
from qfleet.core.types import EnvSpec, Regression, Transition, stored_spec
from qfleet.envs.registry import make_env
from qfleet.networks import from_nnx, make_network
from qfleet.presets import PRESETS, make_config
from qfleet.topologies.fused import Fused
from qfleet.topologies.placement import Placement

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

ONE = MeshConfig()
MESHES = [MeshConfig(data=d, model=m) for d, m in ((2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (4, 2))]

SPECS = {
    "mlp": EnvSpec(name="mlp", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2),
    "minatar": EnvSpec(name="m", observation_shape=(10, 10, 4), observation_dtype=np.dtype(np.bool_), num_actions=3),
    "nature": EnvSpec(
        name="n", observation_shape=(84, 84), observation_dtype=np.dtype(np.uint8), num_actions=6, frame_stack=4
    ),
}
BATCH_SIZE = 16


def name_of(mesh):
    return f"{mesh.data}x{mesh.model}"


def random_batches(spec, agent, num_batches, seed=0):
    """Batches as a replay or a rollout would have them, `[batches, samples, ...]`."""
    rng = np.random.default_rng(seed)
    shape = (num_batches, BATCH_SIZE)

    def observations():
        obs = rng.integers(256, size=(*shape, *spec.agent_observation_shape), dtype=np.uint8)
        return obs if spec.observation_dtype == np.uint8 else (obs / 128 - 1).astype(spec.observation_dtype)

    action = rng.integers(spec.num_actions, size=shape, dtype=np.int32)
    number, weight = (rng.uniform(size=shape).astype(np.float32) for _ in range(2))
    if agent.replay == "none":
        return Regression(observations(), action, number, weight)
    discount = np.where(rng.uniform(size=shape) < 0.2, 0, 0.97).astype(np.float32)
    return Transition(observations(), action, number, discount, observations(), weight)


def learned(mesh, spec, config, batches):
    """The learner's state after these batches, on that mesh, from the same start as on any other."""
    network = make_network(spec, config)
    learner = make_learner(make_agent(network, config), config)
    placement = Placement(mesh, network)

    def init():
        return learner.init(network.init(jax.random.key(0)))

    def learn(state, batches):
        def step(state, batch):
            return update(learner, state, batch, placement.replicas.mean)[0], None

        return jax.lax.scan(step, state, batches)[0]

    specs = placement.partition_learner(jax.eval_shape(init))
    start = placement.jit(init, (), specs)()
    return placement.jit(learn, (specs, P(None, "data")), specs, (0,))(start, batches)


def assert_close(mesh, spec, config, num_steps, tolerance):
    config = dataclasses.replace(config, batch_size=BATCH_SIZE, target_update_period=7)
    batches = random_batches(stored_spec(spec, make_network(spec, config).store), config, num_steps)
    expected = learned(ONE, spec, config, batches)
    found = learned(mesh, spec, config, batches)

    def check(x, y):
        difference = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        assert difference <= tolerance * max(np.linalg.norm(y), 1e-30)

    jax.tree.map(check, (found.params, found.target_params), (expected.params, expected.target_params))
