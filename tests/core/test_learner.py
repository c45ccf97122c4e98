"""Compares the learner with steps worked out by hand, and with a learner whose batch is split over replicas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, make_optimiser, update
from qfleet.core.replicas import over_axis
from qfleet.core.types import EnvSpec, Network, Regression, Transition
from qfleet.networks import make_network

NUM_ACTIONS, BATCH_SIZE = 3, 8


def apply_network(params, obs):
    return jnp.tanh(obs @ params["hidden"]) @ params["head"]


NETWORK = Network(
    init=lambda key: {"hidden": jax.random.normal(key, (2, 4)), "head": jax.random.normal(key, (4, NUM_ACTIONS))},
    apply=apply_network,
)


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(1), 6)
    return Transition(
        obs=jax.random.normal(keys[0], (BATCH_SIZE, 2)),
        action=jax.random.randint(keys[1], (BATCH_SIZE,), 0, NUM_ACTIONS),
        reward=jax.random.normal(keys[2], (BATCH_SIZE,)),
        discount=jax.random.choice(keys[3], jnp.array([0.0, 0.9, 0.81]), (BATCH_SIZE,)),
        next_obs=jax.random.normal(keys[4], (BATCH_SIZE, 2)),
        weight=jax.random.uniform(keys[5], (BATCH_SIZE,)),
    )


def make(network=NETWORK, **settings):
    """Returns a learner, its first state and its agent."""
    config = AgentConfig(**settings)
    agent = make_agent(network, config)
    learner = make_learner(agent, config)
    return learner, learner.init(agent.init(jax.random.key(0))), agent


def make_built_in(**settings):
    """Returns the same with the network that qfleet builds."""
    spec = EnvSpec(name="test", observation_shape=(2,), observation_dtype=np.dtype(np.float32), num_actions=NUM_ACTIONS)
    settings = {"hidden_sizes": (8,), **settings}
    return make(make_network(spec, AgentConfig(**settings)), **settings)


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **(tolerance or {"rtol": 1e-5, "atol": 1e-7})), left, right
    )


def assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


OPTIMISERS = {
    "adam": (optax.adam(1e-3), {}),
    "adam_with_options": (optax.adam(1e-3, eps=1e-4, b1=0.5), {"optimiser_options": {"eps": 1e-4, "b1": 0.5}}),
    "rmsprop": (optax.rmsprop(1e-3), {"optimiser": "rmsprop"}),
    "adamw": (optax.adamw(1e-3), {"optimiser": "adamw"}),
    **{
        f"centred_rmsprop_{i}": (
            optax.rmsprop(1e-3, centered=True, **options),
            {"optimiser": "rmsprop", "optimiser_options": {"centered": True, **options}},
        )
        for i, options in enumerate(
            [
                {"eps": 1e-3},
                {"eps": 1e-3, "momentum": 0.9, "nesterov": True, "decay": 0.5},
                {"eps": 1e-3, "eps_in_sqrt": False, "bias_correction": True, "initial_scale": 0.1},
            ]
        )
    },
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_updates_are_optaxs_own(name, batch):
    optimiser, settings = OPTIMISERS[name]
    learner, state, agent = make(**settings, max_gradient_norm=None, target_update_period=10**6)
    params, optimiser_state = state.params, optimiser.init(state.params)

    @jax.jit
    def step_of_optax(params, optimiser_state, target_params):
        loss = jax.value_and_grad(agent.loss, has_aux=True)
        (value, found), grads = loss(params, target_params, batch)
        updates, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return optax.apply_updates(params, updates), optimiser_state, value, found.td_error

    step = jax.jit(lambda state: update(learner, state, batch))
    for _ in range(3):
        state, info = step(state)
        params, optimiser_state, loss, td_error = step_of_optax(params, optimiser_state, state.target_params)
        np.testing.assert_allclose(info.loss, loss, rtol=1e-6)
        np.testing.assert_allclose(info.td_error, td_error, rtol=1e-5)
    assert_trees_close(state.params, params)


@pytest.mark.parametrize("options", [{}, {"eps_in_sqrt": False}, {"bias_correction": True}], ids=str)
def test_a_gradient_that_hardly_changes_gives_centred_rmsprop_no_negative_variance(options):
    """The mean square and the square of the mean are then equal up to rounding, which may have either sign."""
    options = {"centered": True, "decay": 0.95, "eps": 1.5e-7, **options}
    optimiser = make_optimiser(AgentConfig(optimiser="rmsprop", optimiser_options=options, max_gradient_norm=None))
    params = jnp.zeros(512)
    grads, state = jnp.linspace(1.0, 100.0, 512), optimiser.init(params)

    def step(state, _):
        updates, state = optimiser.update(grads, state, params)
        return state, updates

    _, updates = jax.lax.scan(step, state, length=400)
    assert np.all(np.isfinite(updates)) and np.all(np.asarray(updates) < 0)


def test_a_step_of_plain_gradient_descent_by_hand(batch):
    learner, state, _ = make(optimiser="sgd", learning_rate=0.5, max_gradient_norm=None)
    grads, _ = learner.gradients(state, batch)
    after = learner.apply(state, grads)
    assert_trees_close(after.params, jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads))


@pytest.mark.parametrize(("norm", "scale"), [(2.5, 0.5), (5.0, 1.0), (100.0, 1.0)])
def test_gradients_are_scaled_down_to_the_greatest_norm_but_never_up(norm, scale):
    """The gradient has a norm of 5, spread over both leaves."""
    learner, state, _ = make(optimiser="sgd", learning_rate=1.0, max_gradient_norm=norm)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    grads = {"hidden": grads["hidden"].at[0, 0].set(3.0), "head": grads["head"].at[1, 1].set(4.0)}
    after = learner.apply(state, grads)
    assert_trees_close(after.params, jax.tree.map(lambda p, g: p - scale * g, state.params, grads))


def step_repeatedly(learner, state, batch, num_steps):
    """Yields the states after each learner step."""
    step = jax.jit(lambda state: update(learner, state, batch)[0])
    for _ in range(num_steps):
        state = step(state)
        yield state


def test_the_target_network_is_copied_exactly_once_every_period(batch):
    learner, state, _ = make(target_update_period=3)
    known_target = state.params
    for learner_step, after in enumerate(step_repeatedly(learner, state, batch, 10), start=1):
        if learner_step % 3 == 0:
            known_target = after.params
        assert_trees_equal(after.target_params, known_target)
        assert int(after.target_age) == learner_step % 3
        assert not np.array_equal(after.params["head"], state.params["head"])


def test_a_copy_is_exact_where_target_and_online_parameters_are_far_apart():
    """Adding the whole difference to the target would round a small parameter away."""
    learner, state, _ = make(optimiser="sgd", learning_rate=1.0, max_gradient_norm=None, target_update_period=1)
    state = state._replace(target_params=jax.tree.map(lambda x: jnp.full_like(x, 1e8), state.params))
    after = jax.jit(learner.apply)(state, jax.tree.map(jnp.zeros_like, state.params))
    assert_trees_equal(after.target_params, state.params)


def test_a_period_of_one_copies_every_step(batch):
    learner, state, _ = make(target_update_period=1)
    for after in step_repeatedly(learner, state, batch, 3):
        assert_trees_equal(after.target_params, after.params)


@pytest.mark.parametrize("period", [1, 2])
def test_polyak_averaging_moves_the_target_its_share_of_the_way(batch, period):
    learner, state, _ = make(target_update_period=period, target_update_rate=0.1)
    known_target = state.params
    for learner_step, after in enumerate(step_repeatedly(learner, state, batch, 4), start=1):
        if learner_step % period == 0:
            known_target = jax.tree.map(lambda target, online: 0.9 * target + 0.1 * online, known_target, after.params)
        assert_trees_close(after.target_params, known_target)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_a_learner_step_keeps_the_type_of_every_number(batch, dtype, rate):
    """Otherwise a loop over learner steps can't be compiled."""
    learner, state, agent = make(target_update_period=1, target_update_rate=rate)
    params = jax.tree.map(lambda x: x.astype(dtype), agent.init(jax.random.key(0)))
    state = learner.init(params)
    after, _ = jax.eval_shape(lambda: update(learner, state, batch))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_targets_come_from_the_target_network(batch):
    """The target parameters stay the same between two copies."""
    learner, state, agent = make(target_update_period=1000)
    for after in step_repeatedly(learner, state, batch, 3):
        _, info = learner.gradients(after, batch)
        _, expected = agent.loss(after.params, state.params, batch)
        np.testing.assert_allclose(info.td_error, expected.td_error, rtol=1e-5)


def test_without_replay_there_is_no_target_network(batch):
    learner, state, _ = make(replay="none")
    assert state.target_params == ()
    regression = Regression(batch.obs, batch.action, batch.reward, batch.weight)
    for after in step_repeatedly(learner, state, regression, 3):
        assert after.target_params == ()
        assert int(after.target_age) == 0


def split(batch):
    return jax.tree.map(lambda x: x.reshape(2, BATCH_SIZE // 2, *x.shape[1:]), batch)


HEADS = {
    "scalar": {},
    "c51": {"head": "c51"},
    "iqn": {"head": "iqn", "num_quantiles": 8},
    "noisy": {"noisy": True, "dueling": True},
    "munchausen_iqn_noisy": {"head": "iqn", "munchausen": True, "noisy": True, "num_quantiles": 8},
}


@pytest.mark.parametrize("head", HEADS)
def test_two_replicas_take_the_step_of_one_learner(batch, head):
    """The mean gradient of two half batches is the gradient of the whole, with any weights and the same draws."""
    learner, state, _ = make_built_in(**HEADS[head])
    assert len(np.unique(batch.weight)) == BATCH_SIZE
    key, replicas = jax.random.key(3), over_axis("replica", 2)
    whole, info = jax.jit(lambda batch: update(learner, state, batch, key))(batch)
    of_replica = jax.vmap(lambda half: update(learner, state, half, key, replicas), axis_name="replica")
    halves, infos = jax.jit(of_replica)(split(batch))
    for i in (0, 1):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], halves), whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.ravel(infos.priority), info.priority, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["iqn", "noisy"])
def test_each_step_and_each_sample_draws_anew(batch, head):
    learner, state, _ = make_built_in(**HEADS[head])
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batch)
    errors_of = jax.jit(lambda key: update(learner, state, same, key)[1].td_error)
    steps = [errors_of(jax.random.key(number)) for number in (0, 1)]
    assert not np.allclose(*steps)
    if head == "iqn":  # noise is one for all samples of a step, but fractions aren't
        assert len(np.unique(steps[0])) == BATCH_SIZE


def test_rows_without_weight_teach_nothing(batch):
    learner, state, _ = make()
    weight = batch.weight.at[3].set(0.0)
    grads, _ = learner.gradients(state, batch._replace(weight=weight))
    others, _ = learner.gradients(state, batch._replace(weight=weight, reward=batch.reward.at[3].set(1e6)))
    assert_trees_equal(grads, others)


@pytest.mark.parametrize("replay", ["uniform", "none"])
def test_a_learner_state_may_be_donated_again_and_again(batch, replay):
    """No buffer is held twice, neither at first nor after the target network has been copied."""
    learner, state, _ = make(replay=replay, target_update_period=1)
    if replay == "none":
        batch = Regression(batch.obs, batch.action, batch.reward, batch.weight)
    step = jax.jit(lambda state, batch: update(learner, state, batch)[0], donate_argnums=0)
    for _ in range(3):
        leaves = jax.tree.leaves(state)
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
        state = step(state, batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


RATES = {
    "constant": ({}, [1.0, 1.0, 1.0, 1.0]),
    "linear": ({"learning_rate_schedule": "linear", "learning_rate_end_fraction": 0.2}, [1.0, 0.6, 0.2, 0.2]),
    "cosine": ({"learning_rate_schedule": "cosine", "learning_rate_end_fraction": 0.2}, [1.0, 0.6, 0.2, 0.2]),
    "exponential": (
        {"learning_rate_schedule": "exponential", "learning_rate_end_fraction": 0.01},
        [1.0, 0.1, 0.01, 0.01],
    ),
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_learning_rate_follows_its_schedule(schedule):
    """It is checked at the first learner step, half way, at the end, and long after it."""
    settings, expected = RATES[schedule]
    optimiser = make_optimiser(
        AgentConfig(
            optimiser="sgd", learning_rate=0.5, learning_rate_learner_steps=4, max_gradient_norm=None, **settings
        )
    )
    params = jnp.float32(0)
    state, rates = optimiser.init(params), []
    for _ in range(10):
        step, state = optimiser.update(jnp.float32(1), state, params)
        rates.append(-float(step) / 0.5)
    np.testing.assert_allclose([rates[0], rates[2], rates[4], rates[9]], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "remedy"), [("adm", "Did you mean .*adam"), ("RMSProp", "RMSProp"), ("lbfgs", "lbfgs"), ("dpsgd", "dpsgd")]
)
def test_an_unknown_optimiser_is_refused_with_the_nearest_names(name, remedy):
    with pytest.raises(ConfigError, match=f"optimiser must be one of Optax's, got .*{remedy}"):
        make_optimiser(AgentConfig(optimiser=name))


@pytest.mark.parametrize("option", ["momentum", "learning_rate", "epsilon"])
def test_an_option_that_the_optimiser_does_not_take_is_refused_with_those_it_takes(option):
    """The learning rate has a setting of its own."""
    with pytest.raises(ConfigError, match=rf"arguments of optax.adam, got {option}; it takes b1, b2, eps"):
        make_optimiser(AgentConfig(optimiser_options={option: 0.9}))


@pytest.mark.parametrize("name", ["adabelief", "adafactor", "lamb", "lion", "novograd", "rprop", "yogi"])
def test_optimisers_of_all_kinds_take_a_step_downhill(name):
    optimiser = make_optimiser(AgentConfig(optimiser=name))
    params = {"x": jnp.full((2, 2), 3.0)}
    state = jax.jit(optimiser.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = optimiser.update(jax.grad(lambda p: jnp.sum(p["x"] ** 2))(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert np.all(params["x"] < 3.0)
