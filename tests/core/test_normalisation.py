"""Running statistics against NumPy's, and what they do to a learner, whole, in replicas and in shards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_servers import config_of, learner_of

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.agent import make_agent
from qfleet.core.learner import make_learner, update
from qfleet.core.masks import INVALID, join, masked
from qfleet.core.normalisation import init_statistics, learned, moments, moved, normalise, value_scale
from qfleet.core.replicas import over_axis
from qfleet.core.sharded_learner import piece_bounds
from qfleet.core.types import EnvSpec, Regression, Transition
from qfleet.networks import make_network

SPEC = EnvSpec(name="small", observation_shape=(3,), observation_dtype=np.dtype(np.float32), num_actions=2)
BOTH = {"normalise_observations": True, "normalise_rewards": True}


def batch_of(size, seed, offset=1e4):
    """Returns a batch whose observations are far from 0, of different sizes, and constant in the last place."""
    random = np.random.default_rng(seed)
    obs = (offset + random.normal(size=(2, size, 3)) * [1.0, 50.0, 0.0]).astype(np.float32)
    return Transition(
        obs=jnp.asarray(obs[0]),
        action=jnp.asarray(random.integers(2, size=size), jnp.int32),
        reward=jnp.asarray(5 + 3 * random.normal(size=size), jnp.float32),
        discount=jnp.asarray(random.choice([0.0, 0.9], size=size), jnp.float32),
        next_obs=jnp.asarray(obs[1]),
        weight=jnp.asarray(random.random(size), jnp.float32),
    )


def made(**settings):
    config = AgentConfig(**{"hidden_sizes": (8,), "optimiser": "sgd", "learning_rate": 0.1, **BOTH, **settings})
    agent = make_agent(make_network(SPEC, config), config)
    learner = make_learner(agent, config)
    return config, agent, learner, learner.init(agent.init(jax.random.key(0)))


def steps(learner, state, batches):
    step = jax.jit(lambda state, batch: update(learner, state, batch, jax.random.key(0))[0])
    return functools.reduce(step, batches, state)


def assert_close(x, y, rtol=1e-4):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5), x, y)


def test_statistics_are_numpys_of_all_batches_but_the_first():
    """The variance stays right although it is tiny beside the mean, whose square float32 can't tell it from."""
    batches = [batch_of(16, seed) for seed in range(12)]
    _, _, learner, state = made()
    found = steps(learner, state, batches).params["statistics"]
    joined = jax.tree.map(lambda *x: np.concatenate(x).astype(np.float64), *batches[1:])
    for name, data in (("observation", joined.obs), ("reward", np.stack([joined.reward, joined.discount], axis=-1))):
        mean = np.average(data, axis=0, weights=joined.weight)
        variance = np.average((data - mean) ** 2, axis=0, weights=joined.weight)
        np.testing.assert_allclose(found[name]["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(found[name]["variance"], variance, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(found[name]["weight"], joined.weight.sum() / 16, rtol=1e-5)


def test_observations_become_standard_and_those_that_tell_nothing_zero():
    unknown = init_statistics((3,))
    np.testing.assert_array_equal(normalise(unknown, jnp.ones((2, 3)) * 1e4), np.zeros((2, 3)))
    known = {"known": 1.0, "mean": jnp.array([1e4, -5, 7]), "variance": jnp.array([4.0, 1e-6, 0.0]), "weight": 9.0}
    obs = np.array([[1e4 + 2, -5 - 1e-3, 7], [1e4 + 1e6, -6, 8]], np.float32)
    np.testing.assert_allclose(normalise(known, obs), [[1, -1, 0], [10, -10, 0]], rtol=1e-3)
    np.testing.assert_allclose(normalise(known, np.array([[10_002, -5, 7]])), [[1, 0, 0]])  # whole numbers


def test_a_gradient_from_before_the_first_batch_is_left_out():
    """A worker may have begun it with parameters that knew nothing, whose distances are from 0."""
    batches = [batch_of(16, seed).obs for seed in range(3)]
    weight, unknown = jnp.ones(16), init_statistics((3,))
    late = moments(unknown, batches[2], weight)
    after = moved(unknown, moments(unknown, batches[0], weight))
    after = moved(after, moments(after, batches[1], weight))
    assert_close(moved(after, late), after, rtol=0)
    assert_close(moved(after, moments(after, batches[2], 0 * weight)), after, rtol=0)  # as does one without weight


@pytest.mark.parametrize("replay", ["prioritised", "none"])
def test_two_replicas_take_the_steps_of_one_learner_and_have_its_statistics(replay):
    _, _, learner, state = made(replay=replay)
    batches = [batch_of(16, seed) for seed in range(3)]
    if replay == "none":
        batches = [
            Regression(b.obs, b.action, b.reward, b.weight, reward=b.reward, discount=b.discount) for b in batches
        ]
    replicas = over_axis("replica", 2)

    @jax.jit
    def step_of_both(state, batch):
        half = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), batch)
        both, _ = jax.vmap(lambda half: update(learner, state, half, None, replicas), axis_name="replica")(half)
        return jax.tree.map(lambda x: x[1], both)

    assert_close(functools.reduce(step_of_both, batches, state), steps(learner, state, batches), rtol=1e-3)


def test_the_optimiser_sees_the_gradient_of_the_same_network_and_no_statistics():
    """Neither do moments count in the norm by which gradients are clipped, nor does the optimiser move statistics."""
    settings = {"normalise_rewards": False, "optimiser": "adamw", "optimiser_options": {"weight_decay": 0.5}}
    config, agent, learner, state = made(max_gradient_norm=0.01, **settings)
    state = steps(learner, state, [batch_of(64, seed) for seed in range(2)])
    statistics, batch = state.params["statistics"]["observation"], batch_of(16, 9)
    plain_config = AgentConfig(**{**vars(config), "normalise_observations": False})
    plain = make_agent(make_network(SPEC, plain_config), plain_config)
    obs, next_obs = (normalise(statistics, each) for each in (batch.obs, batch.next_obs))
    grads, info = learner.gradients(state._replace(target_params=state.params), batch)
    (loss, _), plain_grads = jax.value_and_grad(plain.loss, has_aux=True)(
        state.params["network"], state.params["network"], batch._replace(obs=obs, next_obs=next_obs)
    )
    assert_close((info.loss, grads["network"]), (loss, plain_grads))
    assert learned(state.params) is state.params["network"]
    after = learner.apply(state, grads)
    zeros = jax.tree.map(jnp.zeros_like, grads["statistics"])
    changed = learner.apply(state, {**grads, "statistics": zeros})
    assert_close(after.params["network"], changed.params["network"], rtol=0)
    assert_close(after.optimiser_state, changed.optimiser_state, rtol=0)
    expected = moved(statistics, grads["statistics"]["observation"])
    assert_close(after.params["statistics"]["observation"], expected, rtol=0)
    np.testing.assert_allclose(agent.q_values(state.params, batch.obs), plain.q_values(state.params["network"], obs))


def test_action_masks_are_no_part_of_what_is_normalised():
    spec = dataclasses.replace(SPEC, has_action_mask=True)
    config = AgentConfig(**BOTH, hidden_sizes=(8,))
    agent = make_agent(masked(make_network(spec, config), spec), config)
    learner = make_learner(agent, config)
    state = learner.init(agent.init(jax.random.key(0)))
    batches = [batch_of(16, seed) for seed in range(3)]
    mask = jnp.tile(jnp.array([[1.0, 0.0], [1.0, 1.0]]), (8, 1))
    joined = [b._replace(obs=join(b.obs, mask, 1), next_obs=join(b.next_obs, mask, 1)) for b in batches]
    found = steps(learner, state, joined).params
    _, _, plain, plain_state = made()
    assert_close(found["statistics"], steps(plain, plain_state, batches).params["statistics"], rtol=1e-5)
    q = agent.q_values(found, joined[0].obs, jax.random.split(jax.random.key(0), 16))
    np.testing.assert_array_equal(q[::2, 1], INVALID)  # finite, whatever the scale


def rewards(mean, going_on, variance):
    return {"known": 1.0, "mean": jnp.array([mean, going_on]), "variance": jnp.array([variance, 0.1]), "weight": 3.0}


def test_rewards_are_divided_by_the_size_of_the_return_and_values_are_not():
    """Worked by hand: rewards of 2 +- 3, which go on by 0.5 on average, return 4 +- sqrt(12): sqrt(28) in size."""
    config, agent, _, state = made(normalise_observations=False, loss="squared")
    params = {**state.params, "statistics": {"reward": rewards(2.0, 0.5, 9.0)}}
    target = {**state.params, "statistics": {"reward": rewards(0.0, 0.0, 4.0)}}
    scale, batch = np.sqrt(28.0), batch_of(8, 0, offset=0.0)
    np.testing.assert_allclose(value_scale(params, config), scale, rtol=1e-6)
    q, q_next = agent.q_values(params, batch.obs), agent.q_values(target, batch.next_obs)
    keyed = agent.q_values(params, batch.obs, jax.random.split(jax.random.key(0), 8))
    np.testing.assert_allclose(keyed, q, rtol=1e-5)
    np.testing.assert_allclose(agent.player.values(params, agent.player.begin(batch.obs))[0], q, rtol=1e-5)
    plain_config = AgentConfig(**{**vars(config), "normalise_rewards": False})
    plain = make_network(SPEC, plain_config)
    np.testing.assert_allclose(q, scale * plain.apply(params["network"], batch.obs), rtol=1e-5)
    np.testing.assert_allclose(q_next, 2.0 * plain.apply(target["network"], batch.next_obs), rtol=1e-5)
    loss, found = agent.loss(params, target, batch)
    error = batch.reward + batch.discount * q_next.max(axis=1) - q[np.arange(8), batch.action]
    np.testing.assert_allclose(found.td_error, error, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.priority, error, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(batch.weight * 0.5 * (error / scale) ** 2), rtol=1e-4)


def test_the_scale_is_one_while_nothing_is_known_and_finite_without_an_end():
    config, _, _, state = made()
    assert value_scale(state.params, config) == 1.0
    for mean, going_on, variance, expected in ((0.0, 0.9, 0.0, 1.0), (1.0, 1.0, 0.0, 1e4)):
        params = {"statistics": {"reward": rewards(mean, going_on, variance)}}
        np.testing.assert_allclose(value_scale(params, config), expected, rtol=1e-3)


@pytest.mark.parametrize("head", ["c51", "iqn"])
def test_every_head_learns_in_scaled_units(head):
    _, _, learner, state = made(head=head, num_atoms=11, num_quantiles=4, num_cosines=4, munchausen=head == "iqn")
    step = jax.jit(lambda state, batch: update(learner, state, batch, jax.random.key(0)))
    for seed in range(3):
        state, info = step(state, batch_of(16, seed))
    assert np.isfinite(info.loss) and np.abs(info.td_error).mean() > 1.0  # rewards of 5 +- 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_shards_of_a_server_take_the_steps_of_one_learner(num_shards):
    """Statistics are in the last shard's piece, and gradients are clipped by the norm of what is learned alone."""
    settings = {**BOTH, "max_gradient_norm": 0.05, "num_server_shards": num_shards, "hidden_sizes": (8,)}
    sharded = learner_of(config_of(optimiser="adam", **settings))
    whole = jax.jit(sharded.init)(np.uint32(0))
    agent_config = config_of(optimiser="adam", **settings).agent
    spec = EnvSpec(name="s", observation_shape=(4,), observation_dtype=np.dtype(np.float32), num_actions=2)
    learner = make_learner(make_agent(make_network(spec, agent_config), agent_config), agent_config)
    expected = jax.jit(learner.init)(whole.params)
    pieces = [jax.jit(functools.partial(sharded.init_shard, shard=i))(np.uint32(0)) for i in range(num_shards)]
    step = jax.jit(lambda state, batch: update(learner, state, batch)[0])
    gradients = jax.jit(lambda *args: sharded.gradients(*args, jax.random.key(0), jnp.float32)[0])

    @jax.jit
    def apply(pieces, grads):
        square = sum(sharded.squared_norm(grad, i) for i, grad in enumerate(grads))
        return [sharded.apply(piece, grads[i], square, i) for i, piece in enumerate(pieces)]

    def join(pieces):
        return sharded.join([[np.asarray(leaf) for leaf in jax.tree.leaves(piece)] for piece in pieces])

    for seed in range(3):
        batch = batch_of(16, seed)
        obs, next_obs = (jnp.tile(each, 2)[:, :4] for each in (batch.obs, batch.next_obs))
        batch, joined = batch._replace(obs=obs, next_obs=next_obs), join(pieces)
        expected = step(expected, batch)
        pieces = apply(pieces, gradients(joined.params, joined.target_params, batch))
    assert_close(join(pieces).params, expected.params, rtol=1e-3)
    assert_close(join(pieces).target_params, expected.target_params, rtol=1e-3)


def test_the_last_piece_holds_all_statistics():
    assert piece_bounds(10, 3, 2) == [(0, 3), (3, 6), (6, 10)]
    assert piece_bounds(10, 3, 5) == [(0, 3), (3, 5), (5, 10)]


@pytest.mark.parametrize(
    ("dtype", "shape", "what"),
    [(np.bool_, (16,), "are flags"), (np.uint8, (84, 84), "are images"), (np.float32, (10, 10, 4), "are images")],
)
def test_flags_and_images_are_not_normalised(dtype, shape, what):
    spec = EnvSpec(name="other", observation_shape=shape, observation_dtype=np.dtype(dtype), num_actions=2)
    with pytest.raises(ConfigError, match=f"normalise_observations must be left out where observations {what}"):
        make_network(spec, AgentConfig(normalise_observations=True))
    make_network(spec, AgentConfig(normalise_rewards=True))


def accuracy(normalise_observations):
    """Returns how often the greedy action is right after 300 learner steps, where the action's sign must be the
    observation's, whose features are large numbers far from 0.
    """
    _, agent, learner, state = made(
        normalise_observations=normalise_observations, optimiser="adam", learning_rate=0.01, max_gradient_norm=None
    )  # fmt: skip

    def step(state, key):
        side = jax.random.normal(key, (64,))
        obs = jnp.stack([1e4 + side, 1e6 * side**2, jnp.ones(64)], axis=-1)
        action = jax.random.randint(jax.random.fold_in(key, 1), (64,), 0, 2)
        reward = jnp.where((side > 0) == (action == 1), 100.0, 0.0)
        batch = Transition(obs, action, reward, jnp.zeros(64), obs, jnp.ones(64))
        is_right = (agent.q_values(state.params, obs).argmax(axis=-1) == 1) == (side > 0)
        return update(learner, state, batch)[0], jnp.mean(is_right)

    _, is_right = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 300)))(state)
    return float(is_right[-20:].mean())


def test_what_can_not_be_learned_from_large_numbers_can_once_they_are_normalised():
    assert accuracy(normalise_observations=True) > 0.95
    assert accuracy(normalise_observations=False) < 0.75
