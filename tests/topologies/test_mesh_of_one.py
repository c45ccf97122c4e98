"""A mesh of one device, which needs no other hardware than any run has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from qfleet.config import AgentConfig, MeshConfig
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, update
from qfleet.core.types import EnvSpec, Transition, stored_spec
from qfleet.networks import make_network
from qfleet.topologies.mesh import Placement

BATCH_SIZE, NUM_STEPS = 16, 3

SPECS = {
    "mlp": EnvSpec(name="mlp", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2),
    "nature": EnvSpec(
        name="nature", observation_shape=(44, 44), observation_dtype=np.dtype(np.uint8), num_actions=6, frame_stack=4
    ),
}


def random_batches(spec):
    """As many as there are learner steps, `[steps, samples, ...]`."""
    rng = np.random.default_rng(0)
    shape = (NUM_STEPS, BATCH_SIZE)
    obs, next_obs = rng.integers(256, size=(2, *shape, *spec.agent_observation_shape)).astype(spec.observation_dtype)
    action = rng.integers(spec.num_actions, size=shape).astype(np.int32)
    reward, weight = rng.uniform(size=(2, *shape)).astype(np.float32)
    discount = np.where(rng.uniform(size=shape) < 0.2, 0, 0.97).astype(np.float32)
    return Transition(obs, action, reward, discount, next_obs, weight)


def changes(before, after):
    """What was learned, as one vector."""
    return np.concatenate([np.ravel(y - x) for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("is_one_device", [True, False], ids=["as it is", "spread over it as over any other"])
@pytest.mark.parametrize("kind", SPECS)
def test_a_mesh_of_size_one_learns_what_is_learned_without_a_mesh(kind, is_one_device):
    config = AgentConfig(optimiser="sgd", batch_size=BATCH_SIZE, torso=kind, hidden_sizes=(64,))
    network = make_network(SPECS[kind], config)
    learner = make_learner(make_agent(network, config), config)
    placement = Placement(MeshConfig(), network)
    placement.is_one_device = is_one_device

    def init():
        return learner.init(network.init(jax.random.key(0)))

    def learn(state, batches):
        return jax.lax.scan(lambda state, batch: (update(learner, state, batch)[0], None), state, batches)[0]

    specs = placement.partition_learner(jax.eval_shape(init))
    batches = jax.tree.map(jnp.asarray, random_batches(stored_spec(SPECS[kind], network.to_storage_layout)))
    with jax.default_matmul_precision("highest"):  # by default a GPU rounds factors to 10 bits (TF32)
        start, expected = jax.jit(init)(), jax.jit(learn)(init(), batches)
        found = placement.jit(learn, (specs, P(None, "data")), specs)(placement.jit(init, (), specs)(), batches)
    assert isinstance(jax.tree.leaves(found)[0].sharding, jax.sharding.NamedSharding) != is_one_device
    learned, wanted = (changes(*jax.device_get((start.params, state.params))) for state in (found, expected))
    assert np.linalg.norm(wanted) > 1e-3
    assert np.linalg.norm(learned - wanted) <= 1e-4 * np.linalg.norm(wanted)
