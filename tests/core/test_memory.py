"""What an agent remembers: each part follows the lanes' episodes, and agents without a part don't carry it."""

import jax
import jax.numpy as jnp
import numpy as np
import probes

from qfleet.config import AgentConfig
from qfleet.core.agent import make_agent
from qfleet.core.memory import make_memory, memory_shapes
from qfleet.core.player import make_player
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, Row
from qfleet.core.replicas import ALONE
from qfleet.core.types import Regression
from qfleet.core.updates import minibatches_of_lanes, regression

ZERO, HALF = jnp.float32(0), jnp.full(2, 0.5)


def test_a_feed_forward_agent_remembers_what_it_sees_and_no_more() -> None:
    network = probes.linear_network(probes.random_walk(frame_stack=2).spec)
    agent, params = make_agent(network, AgentConfig(), frame_stack=2), network.init(jax.random.key(0))
    memory = agent.memory.init(jnp.ones((3, 2)))
    assert len(jax.tree.leaves(memory)) == 1 and memory.view.shape == (3, 2, 2)
    acted = agent.act(params, memory, ZERO, jnp.full(3, 0.5))
    assert acted.memory is memory
    np.testing.assert_array_equal(acted.q, agent.q_values(params, memory.view))
    np.testing.assert_array_equal(acted.action, np.argmax(acted.q, axis=-1))


def test_a_recurrent_agent_remembers_each_lane_up_to_the_start_of_its_episode() -> None:
    agent = make_agent(probes.summing_network(), AgentConfig(memory="gru"))
    memory = agent.memory.init(jnp.array([[1.0], [10.0]]))
    seen, before = [], []
    for obs, is_first in (([2.0, 20.0], [False, False]), ([3.0, 30.0], [False, True]), ([4.0, 40.0], [True, False])):
        before.append(np.ravel(memory.carry).tolist())
        acted = agent.act({}, memory, ZERO, HALF)
        seen.append(acted.q[:, 0].tolist())
        memory = agent.memory.observe(acted.memory, jnp.array(obs)[:, None], jnp.array(is_first))
    q, after = agent.act_values({}, memory)
    assert [*seen, q[:, 0].tolist()] == [[1, 10], [3, 30], [6, 30], [4, 70]]
    assert [*before, np.ravel(memory.carry).tolist()] == [[0, 0], [1, 10], [3, 0], [0, 30]]
    assert np.ravel(after.carry).tolist() == [4, 70]


def test_a_player_remembers_as_the_agent_does() -> None:
    network = probes.summing_network()
    player = make_player(network)
    memory = player.begin(jnp.array([[1.0], [10.0]]))
    _, memory, _ = player.values({}, memory)
    q, _, activity = player.values({}, player.observe(memory, jnp.ones((2, 1)), jnp.array([False, True])))
    assert q[:, 0].tolist() == [2, 1] and activity == ()


def test_shapes_are_those_of_what_is_remembered() -> None:
    spec = probes.random_walk(frame_stack=1).spec
    shapes = memory_shapes(make_memory(probes.summing_network()), spec, 5)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [(5, 2), (5, 1)]


def rollout(num_lanes: int) -> Regression:
    """Returns a rollout of 4 rows. In lane 0 the second row ends an episode, and the third is its last observation."""
    lanes = jnp.arange(num_lanes, dtype=jnp.float32)
    outcome = jnp.full((4, num_lanes), CONTINUED).at[1:3, 0].set(jnp.array([TERMINATED, NO_STEP]))
    obs = (lanes + 10 * jnp.arange(4.0)[:, None])[..., None]
    rows = Row(obs, jnp.zeros((4, num_lanes), int), jnp.ones((4, num_lanes)), outcome)
    return regression(rows, jnp.zeros((4, num_lanes)), jnp.zeros(num_lanes), AgentConfig(), 100 * lanes[:, None])


def test_a_rollout_is_unrolled_from_where_it_began_and_anew_in_each_episode() -> None:
    agent, batch = make_agent(probes.summing_network(), AgentConfig(memory="gru", replay="none")), rollout(2)
    assert batch.is_first.tolist() == [[False, False], [False, False], [False, False], [True, False]]
    found = agent.loss({}, (), batch)[1]
    values = batch.target - found.td_error.reshape(4, 2)
    np.testing.assert_allclose(values, [[0, 101], [10, 112], [30, 133], [30, 164]], atol=1e-4)


def test_minibatches_of_a_recurrent_network_are_of_whole_lanes_on_any_number_of_replicas() -> None:
    batch, key = rollout(8), jax.random.key(0)
    whole = jax.jit(minibatches_of_lanes, static_argnums=2)(batch, key, 2)
    lanes = whole.carry[..., 0] / 100  # [minibatches, lanes]
    assert sorted(np.ravel(lanes).tolist()) == list(range(8)) and whole.obs.shape == (2, 4, 4, 1)
    expected = lanes[:, None, :, None] + 10 * jnp.arange(4.0)[None, :, None, None]
    np.testing.assert_array_equal(whole.obs, expected)
    np.testing.assert_array_equal(whole.is_first[:, 3], lanes == 0)

    def cut_half(rank: jax.Array) -> Regression:
        def own(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, rank * 4, 4, axis)

        rows = jax.tree.map(lambda x: own(x, 1), batch._replace(carry=()))
        replicas = ALONE._replace(size=2, rank=lambda: rank)
        return minibatches_of_lanes(rows._replace(carry=own(batch.carry, 0)), key, 2, replicas)

    cut = jax.jit(cut_half)
    halves = [cut(jnp.uint32(rank)) for rank in range(2)]
    np.testing.assert_array_equal(whole.carry, np.concatenate([half.carry for half in halves], axis=1))
    np.testing.assert_array_equal(whole.obs, np.concatenate([half.obs for half in halves], axis=2))
