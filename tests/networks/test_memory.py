"""Recurrent cells, and networks that remember."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.heads import Quantiles
from qfleet.core.keys import Draws, draws_of_rows
from qfleet.core.types import EnvSpec
from qfleet.networks import check_network, from_nnx, make_network
from qfleet.networks.memory import MemoryCell

SPEC = EnvSpec(name="small", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=3)
STACKED = dataclasses.replace(SPEC, observation_shape=(5, 5), observation_dtype=np.dtype(np.uint8), frame_stack=2)
ROWS, LANES = 6, 3
IS_FIRST = np.zeros((ROWS, LANES), bool)
IS_FIRST[0, 1] = IS_FIRST[2, 0] = IS_FIRST[3, 0] = IS_FIRST[5, 2] = True


def case(spec=SPEC, **settings):
    """Returns a recurrent network, parameters, a state and rows of observations, all random."""
    network = make_network(spec, AgentConfig(**{"memory": "lstm", "memory_size": 5, "hidden_sizes": (6,)} | settings))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 2).astype(leaf.dtype), shapes)
    obs = rng.integers(0, 9, (ROWS, LANES, *spec.agent_observation_shape)).astype(spec.observation_dtype)
    carry = network.recurrence.initial(LANES)
    return network, params, rng.normal(size=carry.shape).astype(np.float32), obs


def steps(network, params, carry, obs, is_first, draws=None):
    """Returns what repeated steps give, row by row."""
    outputs, step = [], jax.jit(network.recurrence.step)
    for row, first in zip(obs, is_first, strict=True):
        carry, output = step(params, carry, row, first, draws)
        outputs.append(output)
    return carry, jax.tree.map(lambda *rows: np.stack(rows), *outputs)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


@pytest.mark.parametrize(
    "settings",
    [
        {"dueling": True, "hidden_sizes": (6, 7), "layer_norm": True},
        {"memory": "gru", "head": "c51", "num_atoms": 4, "spec": STACKED},
    ],
    ids=["lstm", "gru"],
)
def test_an_unroll_is_the_same_as_repeated_steps(settings):
    network, params, carry, obs = case(**settings)
    assert_close(
        network.recurrence.unroll(params, carry, obs, IS_FIRST, None), steps(network, params, carry, obs, IS_FIRST)
    )


def test_a_lane_shares_its_noise_over_the_rows_of_an_unroll():
    network, params, carry, obs = case(noisy=True)
    draws = Draws(jax.random.split(jax.random.key(3), LANES))
    unroll = jax.jit(network.recurrence.unroll)
    noisy = unroll(params, carry, obs, IS_FIRST, draws)
    assert_close(noisy, steps(network, params, carry, obs, IS_FIRST, draws))
    other = Draws(jax.random.split(jax.random.key(4), LANES))
    assert not np.allclose(noisy[1], unroll(params, carry, obs, IS_FIRST, other)[1], atol=1e-3)


def test_each_row_of_each_lane_draws_quantile_fractions_of_its_own():
    network, params, carry, obs = case(head="iqn", num_quantiles=4)
    draws = Draws(jax.random.key(0), jax.random.split(jax.random.key(1), LANES))
    _, outputs = jax.jit(network.recurrence.unroll)(params, carry, obs, IS_FIRST, draws)
    assert isinstance(outputs, Quantiles) and outputs.value.shape == (ROWS, LANES, 3, 4)
    assert len(np.unique(outputs.fraction)) == outputs.fraction.size
    alone = draws_of_rows(Draws(draws.noise, draws.samples[1:2]), ROWS)
    together = draws_of_rows(draws, ROWS).samples.reshape(ROWS, LANES)
    assert (jax.random.key_data(alone.samples) == jax.random.key_data(together[:, 1])).all()


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_nothing_is_remembered_from_before_the_start_of_an_episode(memory):
    network, params, carry, obs = case(memory=memory)
    _, outputs = jax.jit(network.recurrence.unroll)(params, carry, obs, IS_FIRST, None)
    blank, step = network.recurrence.initial(1), jax.jit(network.recurrence.step)
    for lane, row in zip(*np.nonzero(IS_FIRST.T), strict=True):
        _, alone = step(params, blank, obs[row, lane][None], np.zeros(1, bool), None)
        assert_close(outputs[row, lane], alone[0])
    _, alone = step(params, blank, obs[0, :1], np.zeros(1, bool), None)
    assert not np.allclose(outputs[0, 0], alone, atol=1e-3)


def test_the_other_functions_take_each_observation_for_the_first_of_an_episode():
    network, params, _, obs = case(dueling=True)
    blank, first = network.recurrence.initial(LANES), np.ones(LANES, bool)
    _, q = network.recurrence.step(params, blank, obs[0], first, None)
    assert_close(network.apply(params, obs[0]), q)
    assert_close(network.outputs(params, obs[0], None), q)
    assert_close(network.with_activations(params, obs[0])[0], q)


def test_a_cell_starts_by_remembering():
    """Forget gates, and a GRU's update gates, start with a bias of 1. With 0 they would halve a state at each step."""
    for memory, num_blocks, name in (("lstm", 4, "dense_h"), ("gru", 3, "dense_i")):
        cell = MemoryCell(2, AgentConfig(memory=memory, memory_size=3), nnx.Rngs(0))
        bias = getattr(cell.cell, name).bias[...].reshape(num_blocks, 3)
        np.testing.assert_array_equal(bias.sum(axis=1), [3 * (i == 1) for i in range(num_blocks)])
        carry = np.concatenate([np.ones((1, 3)), np.zeros((1, cell.carry_size - 3))], axis=1)
        kept, _ = nnx.jit(MemoryCell.step)(cell, carry, np.zeros((1, 2)), np.zeros(1, bool))
        if memory == "lstm":
            np.testing.assert_allclose(kept[0, :3], jax.nn.sigmoid(1.0), rtol=1e-6)


def test_gradients_reach_back_through_an_unroll_but_not_into_an_earlier_episode():
    network, params, carry, obs = case()

    @jax.jit
    def last_values(obs):
        return network.recurrence.unroll(params, carry, obs, IS_FIRST, None)[1][-1].sum(axis=-1)

    slopes = np.abs(jax.jacobian(last_values)(jnp.asarray(obs))).sum(axis=-1)  # [lanes, rows, lanes]
    starts = {0: 3, 1: 0, 2: 5}
    for lane, start in starts.items():
        assert (slopes[lane, start:, lane] > 0).all() and not slopes[lane, :start].any()
        assert not np.delete(slopes[lane], lane, axis=1).any()


class OwnModule(nnx.Module):
    """A user's module that adds up what it sees."""

    def __init__(self, rngs, actions=3):
        self.linear = nnx.Linear(4, actions, rngs=rngs)

    def initial_carry(self, num_lanes):
        return jnp.zeros((num_lanes, 4))

    def step(self, carry, x, is_first, draws):
        carry = jnp.where(is_first[:, None], 0.0, carry) + x
        return carry, self.linear(carry)

    def unroll(self, carry, x, is_first, draws):
        return jax.lax.scan(lambda carry, row: self.step(carry, *row, draws), carry, (x, is_first))

    def __call__(self, x):
        return self.linear(x)


class WithoutDraws(OwnModule):
    def unroll(self, carry, x, is_first):
        return carry, self.linear(x)


def test_a_module_of_the_users_own_remembers_through_its_methods():
    network = from_nnx(OwnModule)
    assert check_network(network, SPEC, AgentConfig(memory="gru")) == 15
    params = network.init(jax.random.key(0))
    obs = np.ones((ROWS, LANES, 4), np.float32)
    carry, outputs = network.recurrence.unroll(params, network.recurrence.initial(LANES), obs, IS_FIRST, None)
    np.testing.assert_array_equal(carry[:, 0], [3, 6, 1])
    assert outputs.shape == (ROWS, LANES, 3)


@pytest.mark.parametrize(
    ("network", "memory", "message"),
    [
        (make_network(SPEC, AgentConfig()), "lstm", "must have a recurrence to learn with memory lstm, got none; give"),
        (from_nnx(OwnModule), "none", "memory must be lstm or gru for a network with a recurrence, got none; choose"),
        (from_nnx(WithoutDraws), "gru", "must suit its observations, got TypeError"),
        (from_nnx(OwnModule)._replace(apply=lambda params, x: x[:, :2]), "gru", r"action values float32\[3, 3\], got"),
    ],
)  # fmt: skip
def test_a_network_remembers_if_and_only_if_the_agent_does(network, memory, message):
    with pytest.raises(ConfigError, match=message):
        check_network(network, SPEC, AgentConfig(memory=memory))


def test_a_recurrence_with_other_shapes_is_an_error():
    own = from_nnx(OwnModule)
    wrong = own._replace(recurrence=from_nnx(lambda rngs: OwnModule(rngs, actions=2)).recurrence)
    wrong = wrong._replace(init=lambda key: {"linear": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}})
    wrong = wrong._replace(apply=lambda params, x: x[:, :3])
    with pytest.raises(ConfigError, match=r"must return .*'float32\[3, 3\]'.*, got .*'float32\[3, 2\]'"):
        check_network(wrong, SPEC, AgentConfig(memory="lstm"))
