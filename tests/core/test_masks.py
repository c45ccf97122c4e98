"""Action masks: joined with observations, and honoured by acting and by every target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core import masks
from qfleet.core.agent import make_agent
from qfleet.core.exploration import greedy, masked_epsilon_greedy, masked_softmax
from qfleet.core.heads import Quantiles, make_head, masked_head
from qfleet.core.masks import INVALID, join, masked, nth_valid, shown, split, split_lanes
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, TRUNCATED, Row, make_replay
from qfleet.core.types import EnvSpec, Network, Recurrence, Sequences, Transition, stored_spec
from qfleet.core.updates import regression
from qfleet.envs.action_masks import join_view

NUM_ACTIONS, NUM_ATOMS = 3, 5


def make_spec(shape=(2,), dtype=np.float32, frame_stack=1, has_action_mask=True):
    return EnvSpec(
        name="masked",
        observation_shape=shape,
        observation_dtype=np.dtype(dtype),
        num_actions=NUM_ACTIONS,
        frame_stack=frame_stack,
        has_action_mask=has_action_mask,
    )


# Values of two states. Without masks, the best actions are 2 and 0; with those below they are 1 and 2.
Q = np.array([[1.0, 2.0, 9.0], [8.0, -3.0, -1.0]], np.float32)
MASKS = np.array([[True, True, False], [False, True, True]])
TABLE = Network(init=lambda key: jnp.asarray(Q), apply=lambda params, obs: obs @ params)
STATES = np.eye(2, dtype=np.float32)
JOINED = join(STATES, MASKS, 1)


def test_observations_are_joined_with_masks_in_their_own_dtype_and_split_again():
    obs = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    joined = join(obs, MASKS, 2)
    assert joined.dtype == np.uint8 and joined.shape == (2, 12 + NUM_ACTIONS) == (2, *make_spec((3, 4)).lane_shape)
    for found, expected in zip(split(joined, (3, 4), NUM_ACTIONS), (obs, MASKS), strict=True):
        np.testing.assert_array_equal(found, expected)
    plain, everything = split_lanes(obs, make_spec((3, 4), has_action_mask=False))
    assert plain is obs and everything.all() and everything.shape == MASKS.shape


def test_a_network_without_masks_is_left_as_it_is():
    spec = make_spec(has_action_mask=False)
    assert masked(TABLE, spec) is TABLE and spec.lane_shape == spec.observation_shape


def test_invalid_actions_never_have_the_greatest_value():
    network = masked(TABLE, make_spec())
    q = network.apply(jnp.asarray(Q), JOINED)
    np.testing.assert_array_equal(np.where(MASKS, Q, INVALID), q)
    assert greedy(q).tolist() == [1, 2]
    assert shown(np.asarray(q))[0].tolist() == [1.0, 2.0, -np.inf]
    diverged = network.apply(jnp.full_like(Q, -jnp.inf), JOINED)  # an invalid action doesn't even win then
    assert MASKS[np.arange(2), greedy(diverged)].all()


def test_a_state_without_valid_actions_has_numbers_as_values():
    q = masked(TABLE, make_spec()).apply(jnp.asarray(Q), join(STATES, np.zeros_like(MASKS), 1))
    np.testing.assert_array_equal(q, Q)


def test_stacked_frames_are_seen_with_the_mask_of_the_newest():
    """The network's own storage layout is kept too: here it transposes each frame."""
    spec = make_spec((2, 3), np.uint8, frame_stack=4)
    seen = []

    def apply(params, obs):
        seen.append(obs)
        return jnp.zeros((len(obs), NUM_ACTIONS))

    network = masked(Network(lambda key: (), apply, to_storage_layout=lambda x: jnp.swapaxes(x, -1, -2)), spec)
    stored = stored_spec(spec, network.to_storage_layout)
    assert stored.observation_shape == (6 + NUM_ACTIONS,) and stored.observation_dtype == np.uint8
    frames = np.arange(2 * 6 * 4, dtype=np.uint8).reshape(2, 2, 3, 4)
    view = join_view(frames, MASKS, spec)
    assert view.shape == (2, *stored.agent_observation_shape)
    view = np.stack([network.to_storage_layout(view[..., i]) for i in range(4)], axis=-1)
    q = network.apply((), jnp.asarray(view))
    np.testing.assert_array_equal(seen[0], np.swapaxes(frames, 1, 2))
    np.testing.assert_array_equal(q == 0, MASKS)


def remembering():
    """Returns a network that adds up its observations, `[lanes, 2]`."""

    def step(params, carry, obs, is_first, draws):
        carry = jnp.where(is_first[:, None], 0.0, carry) + obs
        return carry, carry @ params

    def unroll(params, carry, obs, is_first, draws):
        return jax.lax.scan(lambda carry, row: step(params, carry, *row, None), carry, (obs, is_first))

    return TABLE._replace(recurrence=Recurrence(lambda lanes: jnp.zeros((lanes, 2)), step, unroll))


def test_a_network_that_remembers_has_a_mask_with_each_output():
    recurrence = masked(remembering(), make_spec()).recurrence
    views, is_first = jnp.asarray(np.stack([JOINED, JOINED[::-1]])), jnp.zeros((2, 2), bool)
    carry, outputs = recurrence.unroll(jnp.asarray(Q), recurrence.initial(2), views, is_first, None)
    q = masked_head(make_head(AgentConfig())).q_values(outputs)
    np.testing.assert_array_equal(q[0], np.where(MASKS, Q, INVALID))
    np.testing.assert_array_equal(q[1], np.where(MASKS[::-1], Q.sum(axis=0), INVALID))
    carry, outputs = recurrence.step(jnp.asarray(Q), carry, views[0], jnp.ones(2, bool), None)
    np.testing.assert_array_equal(masked_head(make_head(AgentConfig())).q_values(outputs), q[0])


def test_the_nth_valid_action_is_valid():
    every = np.array([[bool(code >> i & 1) for i in range(4)] for code in range(1, 16)])
    for n in range(4):
        has_it = every.sum(-1) > n
        expected = [np.flatnonzero(mask)[n] for mask in every[has_it]]
        assert nth_valid(every[has_it], np.full(has_it.sum(), n)).tolist() == expected
        assert nth_valid(jnp.asarray(every[has_it]), jnp.full(has_it.sum(), n)).tolist() == expected


@pytest.mark.parametrize(("explore", "exploration"), [(masked_epsilon_greedy, 0.9), (masked_softmax, 2.0)])
def test_exploration_takes_valid_actions_only_and_each_of_them(explore, exploration):
    random = np.random.default_rng(0)
    num = 20_000
    is_valid = random.random((num, 6)) < 0.4
    is_valid |= ~is_valid.any(axis=-1, keepdims=True)
    q = masks.with_invalid(jnp.asarray(random.normal(size=(num, 6)), jnp.float32), is_valid)
    # The smallest and the largest numbers are those at which rounding might pick a neighbour.
    uniform = np.concatenate([random.random(num - 2000), np.zeros(1000), np.full(1000, 1 - 2**-24)]).astype(np.float32)
    action = np.asarray(jax.jit(explore)(q, jnp.float32(exploration), uniform))
    assert is_valid[np.arange(num), action].all()
    assert (np.bincount(action, minlength=6) > num / 12).all()


def test_random_actions_are_uniform_among_the_valid_ones():
    uniform = jnp.asarray((np.arange(1000) + 0.5) / 1000, jnp.float32)
    q = masks.with_invalid(jnp.asarray(Q[:1]), MASKS[:1]).repeat(1000, axis=0)
    action = masked_epsilon_greedy(q, jnp.float32(1.0), uniform)
    assert np.bincount(action, minlength=3).tolist() == [500, 500, 0]
    action = masked_softmax(q, jnp.float32(1.0), uniform)
    expected = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(np.bincount(action, minlength=3) / 1000, [*expected, 0], atol=0.002)


def test_an_explorer_that_ignores_masks_gives_way_to_the_best_valid_action():
    q = masks.with_invalid(jnp.asarray(Q), MASKS)
    for action, expected in (([0, 1], [0, 1]), ([2, 0], [1, 2])):
        assert masks.valid_or_greedy(jnp.array(action), q).tolist() == expected


def test_a_repeated_action_gives_way_where_it_is_invalid():
    """Epsilon-z-greedy goes on with an action for many steps, in states that may forbid it."""
    config = AgentConfig(exploration_max_duration=50, exploration_duration_exponent=0.1)
    agent = make_agent(masked(TABLE, make_spec()), config)
    random = np.random.default_rng(0)
    is_valid = random.random((40, 8, NUM_ACTIONS)) < 0.5
    is_valid |= ~is_valid.any(axis=-1, keepdims=True)
    obs = jnp.asarray(join(STATES[random.integers(2, size=(40, 8))], is_valid, 1))

    def step(memory, inputs):
        obs, uniform = inputs
        memory = agent.memory.observe(memory, obs, jnp.zeros(8, bool))
        acted = agent.act(jnp.asarray(Q), memory, jnp.float32(1.0), uniform)
        return acted.memory, acted.action

    uniform = jnp.asarray(random.random((40, 8)), jnp.float32)
    memory, action = jax.lax.scan(step, agent.memory.init(obs[0]), (obs, uniform))
    assert np.take_along_axis(is_valid, np.asarray(action)[..., None], axis=-1).all()
    assert (memory.explorer.num_left > 0).any()


# --- Targets, by hand ---


def make_batch(discount=0.5):
    """Two transitions: from state 0 to 1, and from 1 to 0."""
    return Transition(
        obs=jnp.asarray(JOINED),
        action=jnp.array([0, 1]),
        reward=jnp.array([1.0, 2.0]),
        discount=jnp.full(2, discount),
        next_obs=jnp.asarray(JOINED[::-1].copy()),
        weight=jnp.ones(2),
    )


@pytest.mark.parametrize("double", [False, True])
def test_targets_take_the_best_valid_action(double):
    agent = make_agent(masked(TABLE, make_spec()), AgentConfig(double=double))
    target_params = jnp.asarray([[4.0, 5.0, 50.0], [60.0, 7.0, 6.0]])
    _, found = agent.loss(jnp.asarray(Q), target_params, make_batch())
    # In state 1, the online network prefers action 2, and the target network action 1.
    next_values = np.array([6.0 if double else 7.0, 5.0])
    expected = [1.0 + 0.5 * next_values[0] - Q[0, 0], 2.0 + 0.5 * next_values[1] - Q[1, 1]]
    np.testing.assert_allclose(found.td_error, expected, rtol=1e-6)


def test_munchausens_policy_takes_valid_actions_only():
    temperature, weight = 0.5, 0.9
    config = AgentConfig(
        double=False,
        munchausen=True,
        munchausen_temperature=temperature,
        munchausen_weight=weight,
        munchausen_clip=-100.0,
    )
    agent = make_agent(masked(TABLE, make_spec()), config)
    _, found = jax.jit(agent.loss)(jnp.asarray(Q), jnp.asarray(Q), make_batch())
    for i, (state, action, reward) in enumerate([(0, 0, 1.0), (1, 1, 2.0)]):

        def policy_of(state):
            q = Q[state][MASKS[state]].astype(np.float64)
            weights = np.exp(q / temperature)
            return q, weights / weights.sum()

        _, policy = policy_of(state)
        place = int(MASKS[state][:action].sum())
        q_t, policy_t = policy_of(1 - state)
        soft_value = np.sum(policy_t * (q_t - temperature * np.log(policy_t)))
        target = reward + weight * temperature * np.log(policy[place]) + 0.5 * soft_value
        np.testing.assert_allclose(found.td_error[i], target - Q[state, action], rtol=1e-4)


def outputs_network(head):
    """Returns a network of a head, with outputs that are the same for all but the invalid actions, which are worse."""
    shape = (2, NUM_ACTIONS) if head in ("scalar",) else (2, NUM_ACTIONS, NUM_ATOMS)

    def outputs(params, obs, draws):
        found = jnp.einsum("bs,s...->b...", obs, params)
        return Quantiles(found, jnp.full((len(obs), NUM_ATOMS), 0.5)) if head == "iqn" else found

    return Network(lambda key: jax.random.normal(key, shape), lambda params, obs: obs @ params[..., 0], outputs=outputs)


@pytest.mark.parametrize("head", ["scalar", "c51", "hl_gauss", "qr", "iqn"])
@pytest.mark.parametrize("munchausen", [False, True])
def test_what_a_network_says_of_invalid_actions_enters_no_target_of_any_head(head, munchausen):
    settings = {"num_atoms": NUM_ATOMS} if head in ("c51", "hl_gauss") else {}
    settings |= {"num_quantiles": NUM_ATOMS} if head == "qr" else {}
    config = AgentConfig(head=head, munchausen=munchausen, double=not munchausen, **settings)
    agent = make_agent(masked(outputs_network(head), make_spec()), config)
    params = jax.random.normal(jax.random.key(0), (2, NUM_ACTIONS) + (() if head == "scalar" else (NUM_ATOMS,)))
    is_invalid = jnp.asarray(~MASKS).reshape(*MASKS.shape, *(1,) * (params.ndim - 2))
    loss, batch = jax.jit(agent.loss), make_batch()
    losses = [
        loss(params + is_invalid * change, params + is_invalid * change, batch)[1] for change in (0.0, 100.0, -100.0)
    ]
    for other in losses[1:]:
        jax.tree.map(np.testing.assert_array_equal, losses[0], other)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(losses))


@pytest.mark.parametrize("munchausen", [False, True])
def test_a_terminal_state_without_valid_actions_leaves_losses_and_gradients_finite(munchausen):
    agent = make_agent(masked(TABLE, make_spec()), AgentConfig(munchausen=munchausen, double=not munchausen))
    batch = make_batch(discount=0.0)
    batch = batch._replace(next_obs=batch.next_obs.at[:, -NUM_ACTIONS:].set(0.0))
    (_, found), gradient = jax.jit(jax.value_and_grad(agent.loss, has_aux=True))(jnp.asarray(Q), jnp.asarray(Q), batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, gradient)))
    if not munchausen:
        np.testing.assert_allclose(found.td_error, [1.0 - Q[0, 0], 2.0 - Q[1, 1]])


def test_the_replay_keeps_masks_and_a_truncated_episode_is_valued_by_that_of_its_final_state():
    """One lane: state 0, cut short after a step to state 1, which is final; then a new episode in state 0."""
    spec = make_spec()
    network = masked(TABLE, spec)
    config = AgentConfig(n_step=1, double=False, replay_capacity=8, batch_size=16, replay="uniform")
    replay = make_replay(stored_spec(spec, network.to_storage_layout), config, num_lanes=1)
    state, insert = jax.jit(replay.init)(), jax.jit(replay.insert)
    for number, outcome in ((0, TRUNCATED), (1, NO_STEP), (0, CONTINUED), (0, TERMINATED), (1, NO_STEP)):
        obs = join(STATES[[number]], MASKS[[number]] if outcome != NO_STEP else np.array([[False, True, False]]), 1)
        row = Row(jnp.asarray(obs), jnp.zeros(1, jnp.int32), jnp.ones(1), jnp.full(1, outcome))
        state = insert(state, row)
    transition = jax.jit(replay.sample)(state, jax.random.key(0), jnp.float32(1)).transition
    _, found = jax.jit(make_agent(network, config).loss)(jnp.asarray(Q), jnp.asarray(Q), transition)
    is_cut = (transition.discount > 0) & (transition.next_obs[:, 1] == 1)
    assert is_cut.any()
    # The only valid action of the final state is 1, the worst one.
    expected = 1.0 + config.discount * Q[1, 1] - Q[0, 0]
    np.testing.assert_allclose(np.asarray(found.td_error)[np.asarray(is_cut)], expected, rtol=1e-6)


def test_lambda_returns_bootstrap_from_valid_actions():
    config = AgentConfig(replay="none", trace_decay=0.0, discount=0.5, rollout_length=2)
    agent = make_agent(masked(TABLE, make_spec()), config)
    view = jnp.asarray(JOINED)[:, None]  # two rows of one lane
    q_max = jnp.stack([jnp.max(agent.q_values(jnp.asarray(Q), obs), axis=-1) for obs in view])
    rows = Row(view, jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), jnp.full((2, 1), CONTINUED))
    last_value = jnp.max(agent.q_values(jnp.asarray(Q), jnp.asarray(JOINED[:1])), axis=-1)
    batch = regression(rows, q_max, last_value, config)
    # In state 1 the best valid action is worth -1, and in state 0, which follows the rollout, 2.
    np.testing.assert_allclose(batch.target[:, 0], [1.0 + 0.5 * -1.0, 1.0 + 0.5 * 2.0])


def test_what_a_network_says_of_invalid_actions_enters_no_target_of_a_sequence():
    """Action 2 is never valid, but would have the greatest value."""
    config = AgentConfig(memory="gru", burn_in=1, sequence_length=3, n_step=1, double=True, replay="uniform")
    agent = make_agent(masked(remembering(), make_spec()), config)
    random = np.random.default_rng(0)
    obs = random.normal(size=(4, 5, 2)).astype(np.float32)
    batch = Sequences(
        obs=jnp.asarray(join(obs, np.broadcast_to([True, True, False], (4, 5, 3)), 1)),
        is_first=jnp.zeros((4, 5), bool),
        carry=jnp.zeros((4, 2)),
        action=jnp.asarray(random.integers(2, size=(4, 3))),
        reward=jnp.ones((4, 3)),
        discount=jnp.full((4, 3), 0.9),
        num_steps=jnp.ones((4, 3), jnp.int32),
        is_step=jnp.ones((4, 3), bool),
        weight=jnp.ones(4),
    )
    params = jnp.asarray(random.normal(size=(2, 3)).astype(np.float32))
    loss = jax.jit(agent.loss)
    found = [loss(params.at[:, 2].add(more), params.at[:, 2].add(more), batch)[1] for more in (0.0, 100.0)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    unmasked = jax.jit(make_agent(remembering(), config).loss)
    changed = [
        unmasked(params.at[:, 2].add(more), params.at[:, 2].add(more), batch._replace(obs=jnp.asarray(obs)))[0]
        for more in (0.0, 100.0)
    ]
    assert changed[0] != changed[1]
