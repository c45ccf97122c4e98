"""The loss of sequences against rlax, and the rescaling of values against answers worked out by hand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.agent import make_agent
from qfleet.core.heads import Values, backed_up
from qfleet.core.replay.ring import CONTINUED, NO_STEP, TERMINATED, Ring, Row
from qfleet.core.replay.sequences import sequences
from qfleet.core.rescaling import rescale, unscale
from qfleet.core.types import EnvSpec
from qfleet.networks import make_network

with warnings.catch_warnings():  # rlax imports outdated names, but what it computes is right
    warnings.simplefilter("ignore")
    import rlax

BURN_IN, LENGTH, N_STEP, ROWS, LANES = 2, 5, 3, 10, 4
SPEC = EnvSpec(name="small", observation_shape=(3,), observation_dtype=np.dtype(np.float32), num_actions=3)
CONFIG = AgentConfig(
    memory="gru",
    memory_size=4,
    hidden_sizes=(5,),
    replay="prioritised",
    n_step=N_STEP,
    burn_in=BURN_IN,
    sequence_length=LENGTH,
    double=True,
    value_rescaling=True,
    discount=0.9,
    loss="squared",
)
WEIGHT = jnp.array([1.0, 0.5, 2.0, 0.25])


def random_ring():
    """Returns a ring with one sequence in each lane. The second lane's episode terminates among the learned rows."""
    rng = np.random.default_rng(0)
    outcome = np.full((ROWS, LANES), CONTINUED)
    outcome[4, 1], outcome[5, 1], outcome[0, 2], outcome[1, 2] = TERMINATED, NO_STEP, TERMINATED, NO_STEP
    rows = Row(
        obs=rng.normal(size=(ROWS, LANES, 3)).astype(np.float32),
        action=rng.integers(3, size=(ROWS, LANES)).astype(np.int32),
        reward=(9 * rng.normal(size=(ROWS, LANES))).astype(np.float32),
        outcome=outcome,
        carry=rng.normal(size=(ROWS, LANES, 4)).astype(np.float32),
    )
    one = jnp.ones(1, jnp.int32)
    return Ring(jax.tree.map(jnp.asarray, rows), 0 * one, ROWS * one, ROWS * one.astype(jnp.uint32))


@functools.cache
def case():
    network = make_network(SPEC, CONFIG)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params, target_params = (
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes) for _ in range(2)
    )
    ring = random_ring()
    batch = sequences(ring, jnp.arange(LANES, dtype=jnp.uint32), WEIGHT, CONFIG, CONFIG.discount, frame_stack=1)
    return network, params, target_params, ring.rows, batch


def td_errors_of_rlax(params, target_params, network, rows):
    """Returns the TD error of each learned row, `[LENGTH, LANES]`, by the functions of rlax."""
    is_first = jnp.concatenate([jnp.zeros((1, LANES), bool), rows.outcome[:-1] == NO_STEP])

    def q_values(params):
        unroll = network.recurrence.unroll
        carry, _ = unroll(params, rows.carry[0], rows.obs[:BURN_IN], is_first[:BURN_IN], None)
        return unroll(params, jax.lax.stop_gradient(carry), rows.obs[BURN_IN:], is_first[BURN_IN:], None)[1]

    q, target_q = q_values(params), q_values(target_params)
    learned = jax.tree.map(lambda x: x[BURN_IN:-1], rows)
    discount = jnp.where(learned.outcome == TERMINATED, 0.0, CONFIG.discount)
    of_lane = functools.partial(rlax.transformed_n_step_q_learning, n=N_STEP, tx_pair=rlax.SIGNED_HYPERBOLIC_PAIR)
    errors = jax.vmap(of_lane, 1, 1)(
        q[:-1], learned.action, target_q[1:], jnp.argmax(q, -1)[1:], learned.reward, discount
    )
    return errors[:LENGTH]


def test_losses_priorities_and_gradients_of_sequences_equal_rlax():
    network, params, target_params, rows, batch = case()
    agent = make_agent(network, CONFIG)
    is_step = np.asarray(rows.outcome[BURN_IN : BURN_IN + LENGTH] != NO_STEP)
    assert is_step.sum() == LENGTH * LANES - 1

    def expected_loss(params, target_params):
        errors = td_errors_of_rlax(params, target_params, network, rows)
        of_sequence = jnp.sum(is_step * 0.5 * errors**2, axis=0) / is_step.sum(axis=0)
        return jnp.mean(WEIGHT * of_sequence), errors

    both = jax.jit(jax.value_and_grad(agent.loss, (0, 1), has_aux=True))
    (loss, found), (grads, target_grads) = both(params, target_params, batch)
    of_rlax = jax.jit(jax.value_and_grad(expected_loss, has_aux=True))
    (expected, errors), expected_grads = of_rlax(params, target_params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(target_grads))
    size = np.where(is_step, np.abs(errors), 0)
    mean = size.sum(axis=0) / is_step.sum(axis=0)
    np.testing.assert_allclose(found.td_error, mean, rtol=1e-4)
    np.testing.assert_allclose(found.priority, 0.9 * size.max(axis=0) + 0.1 * mean, rtol=1e-4)


def test_the_burn_in_only_brings_the_memory_up_to_date():
    """Its rows change the values that follow, but no gradient flows through them."""
    network, params, target_params, _, batch = case()
    agent = make_agent(network, CONFIG)
    grad = jax.jit(jax.grad(lambda obs: agent.loss(params, target_params, batch._replace(obs=obs))[0]))
    slopes = np.abs(grad(batch.obs)).sum(axis=(0, 2))
    assert not slopes[:BURN_IN].any() and (slopes[BURN_IN : BURN_IN + LENGTH] > 0).all()
    assert not slopes[BURN_IN + LENGTH :].any()  # rows that are only bootstrapped from
    loss = jax.jit(lambda obs: agent.loss(params, target_params, batch._replace(obs=obs))[1].loss)
    changed = np.asarray(loss(batch.obs.at[:, 0].add(1.0)) != loss(batch.obs))
    assert changed.tolist() == [True, True, False, True]  # the third lane starts an episode within its burn-in


HAND = {0.0: 0.0, 3.0: 1.003, -3.0: -1.003, 8.0: 2.008, 99.0: 9.099, 1e6 - 1: 999 + 999.999}


@pytest.mark.parametrize("x", HAND)
def test_values_are_rescaled_as_worked_out_by_hand(x):
    np.testing.assert_allclose(rescale(jnp.float32(x)), HAND[x], rtol=1e-6)
    np.testing.assert_allclose(unscale(jnp.float32(HAND[x])), x, rtol=1e-5)


def test_rescaling_is_inverted_over_nine_orders_of_magnitude_and_equals_rlax():
    x = np.geomspace(1e-4, 1e5, 200, dtype=np.float32)
    x = np.concatenate([-x, x])
    np.testing.assert_allclose(unscale(rescale(x)), x, rtol=1e-5)
    np.testing.assert_allclose(rescale(x), rlax.signed_hyperbolic(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unscale(x / 100), rlax.signed_parabolic(x / 100), rtol=1e-3, atol=1e-3)
    slopes = jax.vmap(jax.grad(rescale))(x)
    np.testing.assert_allclose(slopes, 0.5 / np.sqrt(np.abs(x) + 1) + 1e-3, rtol=1e-4)


def test_a_rescaled_target_is_that_of_the_return():
    """h(3 + 0.5 h^-1(1.003)) = h(3 + 0.5 * 3) = sqrt(5.5) - 1 + 0.0045, for each value of a distribution."""
    values = Values(jnp.array([[1.003, 0.0]]), jnp.array([[0.25, 0.75]]))
    target = backed_up(jnp.array([3.0]), jnp.array([0.5]), values, is_rescaled=True)
    np.testing.assert_allclose(target.value, [[5.5**0.5 - 1 + 0.0045, 1.003]], rtol=1e-6)
    np.testing.assert_array_equal(target.weight, values.weight)


def test_settings_of_sequences_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="sequence_period must be .* 20, got 21"):
        AgentConfig(memory="lstm", sequence_length=20, sequence_period=21)
    with pytest.raises(ConfigError, match="munchausen must be False with value_rescaling"):
        AgentConfig(munchausen=True, value_rescaling=True)
    assert AgentConfig(memory="lstm", sequence_length=9).rows_per_start == 4
    assert AgentConfig(memory="lstm", sequence_length=8, burn_in=3, n_step=2).rows_after_start == 12
    assert AgentConfig(sequence_length=8, n_step=2).rows_after_start == 2
    config = AgentConfig(memory="lstm", sequence_length=8, batch_size=16, env_steps_per_learner_step=4)
    assert config.replay_ratio == 32
