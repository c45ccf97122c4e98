"""What an agent remembers: each part follows the lanes' episodes, and agents without a part don't carry it."""

import jax
import jax.numpy as jnp
import numpy as np
import probes

from qfleet.config import AgentConfig
from qfleet.core.agent import make_agent
from qfleet.core.memory import make_memory, memory_shapes
from qfleet.core.player import make_player

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
