"""Compares each head's targets and losses with rlax, and with answers worked out by hand."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core import heads
from qfleet.core.agent import make_agent
from qfleet.core.heads import Quantiles, Values
from qfleet.core.types import Network, Regression, Transition

with warnings.catch_warnings():  # rlax imports outdated names, but what it computes is right
    warnings.simplefilter("ignore")
    import rlax

BATCH, NUM_ACTIONS, NUM_ATOMS = 32, 4, 11
ATOMS = np.linspace(-5.0, 5.0, NUM_ATOMS, dtype=np.float32)
FRACTIONS = (np.arange(NUM_ATOMS, dtype=np.float32) + 0.5) / NUM_ATOMS


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return jnp.asarray(2 * rng.normal(size=shape), jnp.float32)


def make_transition(rng):
    """Observations number the samples, and those after them the samples of the next observations."""
    return Transition(
        obs=jnp.arange(BATCH),
        action=jnp.asarray(rng.integers(NUM_ACTIONS, size=BATCH)),
        reward=normal(rng, BATCH),
        discount=jnp.asarray(rng.choice([0.0, 0.99, 0.99**3], size=BATCH), jnp.float32),
        next_obs=jnp.arange(BATCH, 2 * BATCH),
        weight=jnp.ones(BATCH),
    )


def tabular(num_outputs):
    """Returns a network whose outputs are its parameters, a row for each observation."""
    shape = (2 * BATCH, NUM_ACTIONS) if num_outputs is None else (2 * BATCH, NUM_ACTIONS, num_outputs)
    return Network(
        init=lambda key: jax.random.normal(key, shape),
        apply=lambda params, obs: params[obs].mean(-1) if num_outputs else params[obs],
        outputs=lambda params, obs, draws: params[obs],
    )


def descend(loss, params, rate):
    """Returns the parameters after a thousand steps of gradient descent."""
    return jax.lax.fori_loop(0, 1000, lambda _, params: params - rate * jax.grad(loss)(params), params)


def losses_of(config, transition, params, target_params):
    agent = make_agent(tabular(heads.make_head(config).num_outputs), config)
    return jax.jit(agent.loss)(params, target_params, transition)[1]


def categorical(rng, *, double):
    transition, config = (
        make_transition(rng),
        AgentConfig(head="c51", num_atoms=NUM_ATOMS, value_min=-5, value_max=5, double=double),
    )
    params, target_params = (
        normal(rng, 2 * BATCH, NUM_ACTIONS, NUM_ATOMS),
        normal(rng, 2 * BATCH, NUM_ACTIONS, NUM_ATOMS),
    )
    return transition, losses_of(config, transition, params, target_params), params, target_params


@pytest.mark.filterwarnings("ignore:Rlax categorical_cross_entropy:PendingDeprecationWarning")
@pytest.mark.parametrize("double", [False, True])
def test_c51_equals_rlax(rng, double):
    transition, ours, params, target_params = categorical(rng, double=double)
    q_tm1, q_t = params[:BATCH], target_params[BATCH:]
    atoms = jnp.broadcast_to(ATOMS, (BATCH, NUM_ATOMS))
    given = (atoms, q_tm1, transition.action, transition.reward, transition.discount, atoms, q_t)
    if double:
        selector = jax.nn.softmax(params[BATCH:]) @ ATOMS
        theirs = jax.jit(jax.vmap(rlax.categorical_double_q_learning))(*given, selector)
    else:
        theirs = jax.jit(jax.vmap(rlax.categorical_q_learning))(*given)
    np.testing.assert_allclose(ours.loss, theirs, rtol=1e-5, atol=1e-5)


def test_the_priority_of_c51_is_the_divergence_which_is_zero_on_the_target(rng):
    probability = jax.nn.softmax(normal(rng, BATCH, NUM_ACTIONS, NUM_ATOMS))
    head, action = heads.categorical_head(ATOMS), jnp.zeros(BATCH, int)
    same = Values(jnp.broadcast_to(ATOMS, (BATCH, NUM_ATOMS)), probability[:, 0])
    loss = jax.jit(head.loss)
    found = loss(jnp.log(probability), action, same)
    np.testing.assert_allclose(found.priority, 0, atol=1e-5)
    np.testing.assert_allclose(found.td_error, 0, atol=1e-5)
    assert np.all(np.asarray(found.loss) > 0.1), "which is the entropy of the target"
    assert np.all(np.asarray(loss(jnp.log(probability), action + 1, same).priority) > 0)


def test_a_projection_keeps_the_mean_within_the_atoms_and_moves_what_is_beyond_to_the_ends():
    values = Values(jnp.array([[-0.75, 2.0], [-99.0, 99.0]]), jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    expected = np.zeros((2, NUM_ATOMS))
    expected[0, [4, 5, 7]] = 0.375, 0.125, 0.5
    expected[1, [0, -1]] = 0.25, 0.75
    np.testing.assert_allclose(jax.jit(heads.project)(values, ATOMS), expected, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_qr_equals_rlax(rng, double):
    transition = make_transition(rng)
    config = AgentConfig(head="qr", num_quantiles=NUM_ATOMS, huber_delta=0.7, double=double)
    params, target_params = normal(rng, 2, 2 * BATCH, NUM_ACTIONS, NUM_ATOMS)
    ours = losses_of(config, transition, params, target_params)
    q_tm1, q_t, selector = params[:BATCH], target_params[BATCH:], (params if double else target_params)[BATCH:]
    q_tm1, q_t, selector = (jnp.moveaxis(each, 1, 2) for each in (q_tm1, q_t, selector))  # rlax: [quantiles, actions]
    equation = jax.vmap(
        lambda q_tm1, a, r, discount, selector, q_t: rlax.quantile_q_learning(
            q_tm1, jnp.asarray(FRACTIONS), a, r, discount, selector, q_t, huber_param=0.7
        )
    )
    theirs = jax.jit(equation)(q_tm1, transition.action, transition.reward, transition.discount, selector, q_t)
    np.testing.assert_allclose(0.7 * ours.loss, theirs, rtol=1e-5, atol=1e-5)  # theirs isn't divided by kappa
    np.testing.assert_array_equal(ours.priority, ours.loss)


def test_iqn_equals_rlax_at_its_own_fractions(rng):
    values, fraction = normal(rng, BATCH, NUM_ACTIONS, 5), jnp.asarray(rng.random((BATCH, 5)), jnp.float32)
    target, action = normal(rng, BATCH, 7), jnp.asarray(rng.integers(NUM_ACTIONS, size=BATCH))
    head = heads.implicit_quantile_head(1.0)
    ours = jax.jit(head.loss)(Quantiles(values, fraction), action, Values(target, jnp.full_like(target, 1 / 7)))
    equation = jax.vmap(
        lambda q_tm1, fraction, a, q_t: rlax.quantile_q_learning(
            q_tm1.T, fraction, a, 0.0, 1.0, jnp.zeros((7, NUM_ACTIONS)), jnp.stack([q_t] * NUM_ACTIONS, 1), 1.0
        )
    )
    theirs = jax.jit(equation)(values, fraction, action, target)
    np.testing.assert_allclose(ours.loss, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head.q_values(Quantiles(values, fraction)), values.mean(-1), rtol=1e-6)


def test_the_quantiles_of_a_coin_are_learned_and_their_mean_is_its_mean():
    """Gradient descent on single outcomes finds the quantiles of their distribution: 0 for the lower half, 1 above."""
    head, action = heads.quantile_head(4, 0.01), jnp.zeros(2, int)
    outcomes = heads.point_values(jnp.array([0.0, 1.0]))

    def loss(quantiles):
        return jnp.mean(head.loss(jnp.broadcast_to(quantiles, (2, 1, 4)), action, outcomes).loss)

    np.testing.assert_allclose(descend(loss, jnp.full(4, 0.4), 0.01), [0, 0, 1, 1], atol=0.03)


def test_the_histogram_of_hl_gauss_is_that_of_the_normal_distribution():
    """The mass of a Gaussian in each bin by the definition; almost all of it lies within the bins."""
    sigma, mean = 0.75, 0.3
    edges = np.append(ATOMS - 0.5, 5.5)
    points = np.linspace(-5.5, 5.5, 1_100_001)
    density = np.exp(-0.5 * ((points - mean) / sigma) ** 2)
    counts = np.array([density[(points >= a) & (points < b)].sum() for a, b in itertools.pairwise(edges)])
    ours = heads.gauss_histogram(jnp.array([mean, 99.0]), ATOMS, sigma)
    np.testing.assert_allclose(ours[0], counts / counts.sum(), atol=1e-5)
    np.testing.assert_allclose(ours.sum(axis=1), 1, atol=1e-6)
    assert np.argmax(ours[1]) == NUM_ATOMS - 1, "beyond the atoms counts as the last one"


def test_hl_gauss_learns_the_mean_whatever_the_distribution(rng):
    head, action = heads.hl_gauss_head(ATOMS, 0.75), jnp.zeros(1, int)
    target = heads.point_values(jnp.array([1.7]))
    logits = descend(lambda x: head.loss(x, action, target).loss[0], jnp.zeros((1, 1, NUM_ATOMS)), 1.0)
    np.testing.assert_allclose(head.q_values(logits), [[1.7]], atol=0.02)


def munchausen_by_hand(q_tm1, q_t, transition, temperature, weight, clip):
    """Returns the target of each sample by the equations of Vieillard et al. 2020, in float64."""
    targets = []
    for i in range(BATCH):
        policies = [np.exp((q - q.max()) / temperature) for q in (q_tm1[i], q_t[i])]
        log_tm1, log_t = (np.log(np.maximum(p / p.sum(), 1e-300)) for p in policies)
        bonus = weight * np.clip(temperature * log_tm1[transition.action[i]], clip, 0)
        value = np.sum(np.exp(log_t) * (q_t[i] - temperature * log_t))
        targets.append(transition.reward[i] + bonus + transition.discount[i] * value)
    return np.array(targets)


@pytest.mark.parametrize("head", ["scalar", "qr", "c51", "hl_gauss"])
def test_the_mean_target_of_munchausen_follows_its_equations_whatever_the_head(rng, head):
    transition = make_transition(rng)._replace(reward=0.2 * normal(rng, BATCH))
    config = AgentConfig(head=head, munchausen=True, munchausen_temperature=0.5, num_quantiles=NUM_ATOMS)
    num_outputs = heads.make_head(config).num_outputs
    shape = (2, 2 * BATCH, NUM_ACTIONS) if num_outputs is None else (2, 2 * BATCH, NUM_ACTIONS, num_outputs)
    params, target_params = normal(rng, *shape)
    found = losses_of(config, transition, params, target_params)
    q_of = heads.make_head(config).q_values
    q = np.asarray(q_of(target_params), np.float64)
    expected = munchausen_by_hand(q[:BATCH], q[BATCH:], transition, 0.5, 0.9, -1.0)
    taken = np.asarray(q_of(params))[np.arange(BATCH), transition.action]
    np.testing.assert_allclose(found.td_error, expected - taken, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("head", ["scalar", "c51", "qr", "hl_gauss"])
@pytest.mark.parametrize("munchausen", [False, True])
def test_no_gradient_flows_through_a_target(rng, head, munchausen):
    transition, config = make_transition(rng), AgentConfig(head=head, munchausen=munchausen, num_quantiles=NUM_ATOMS)
    network = tabular(heads.make_head(config).num_outputs)
    agent, params = make_agent(network, config), network.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda *given: agent.loss(*given, transition)[0], (0, 1)))(params, params + 1)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_array_equal(gradient[0][BATCH:], 0)
    taken = np.zeros((BATCH, NUM_ACTIONS), bool)
    taken[np.arange(BATCH), transition.action] = True
    moved = np.any(np.asarray(gradient[0][:BATCH]).reshape(BATCH, NUM_ACTIONS, -1) != 0, axis=-1)
    np.testing.assert_array_equal(moved, taken), "only the values of the actions that were taken learn"


@pytest.mark.parametrize("head", ["scalar", "c51", "qr", "hl_gauss"])
def test_a_known_target_is_the_mean_that_is_learned(head):
    """As Q(lambda) gives it: any head can be regressed on it."""
    config = AgentConfig(head=head, replay="none", num_quantiles=NUM_ATOMS)
    network = tabular(heads.make_head(config).num_outputs)
    agent, params = make_agent(network, config), jnp.zeros_like(network.init(jax.random.key(0)))
    batch = Regression(jnp.arange(2), jnp.array([0, 2]), jnp.array([1.5, -2.5]), jnp.ones(2))
    rate = 0.2 if head in ("scalar", "qr") else 2.0
    params = descend(lambda params: agent.loss(params, (), batch)[0], params, rate)
    q = heads.make_head(config).q_values(params)
    np.testing.assert_allclose([q[0, 0], q[1, 2]], [1.5, -2.5], atol=0.05)
