"""The fused topology: learning doesn't depend on chunk lengths, on the number of seeds or on evaluations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from qfleet.config import AgentConfig, FusedConfig, RunFailed, TrainConfig
from qfleet.core import updates
from qfleet.core.types import EnvSpec, Regression
from qfleet.envs.spec import InGraphEnv, StepResult
from qfleet.runtime import evaluation
from qfleet.runtime.checkpoint_trees import named_leaves
from qfleet.topologies.fused import program_on_devices
from qfleet.topologies.fused.topology import Fused

NUM_ENVS = 4
ROWS = 16
"""Rows of one iteration, with and without replay."""

CHUNK = NUM_ENVS * ROWS

AGENTS = {
    "pqn": AgentConfig(replay="none", rollout_length=ROWS, num_minibatches=4, exploration_env_steps=1000),
    "uniform": AgentConfig(
        batch_size=16,
        replay_capacity=300,
        warmup_env_steps=3 * CHUNK,
        env_steps_per_learner_step=6,
        target_update_period=7,
        exploration_env_steps=1000,
    ),
    "prioritised": AgentConfig(
        replay="prioritised",
        n_step=3,
        double=True,
        batch_size=16,
        replay_capacity=300,
        warmup_env_steps=50,
        env_steps_per_learner_step=2.5,
        target_update_period=1,
        target_update_rate=0.05,
        exploration_env_steps=1000,
        importance_exponent_env_steps=1000,
    ),
}


def make(agent, env=None, num_envs=NUM_ENVS, **settings):
    env = env or probes.random_walk()
    agent = AGENTS.get(agent, agent)
    config = TrainConfig(env="probe", agent=agent, topology=FusedConfig(num_envs=num_envs), eval_episodes=5, **settings)
    fused = Fused(config, env, probes.linear_network(env.spec))
    fused.start()
    return fused


def snapshot(fused):
    """Returns copies, because the next call of the program deletes the arrays of the state."""
    return jax.tree.map(jnp.copy, fused.state), fused.counters


def restore(fused, state, counters):
    fused.restore(jax.tree.map(jnp.copy, state), counters)


@functools.cache
def started(kind):
    """Returns a topology that all tests of this kind of agent share, and its first state: it is compiled only once."""
    fused = make(kind)
    return fused, snapshot(fused)


@functools.cache
def started_with_seeds(kind):
    """Returns the same for the three seeds 5 to 7, trained side by side."""
    fused = make(kind, seed=5, num_seeds=3)
    return fused, snapshot(fused)


def fresh(kind, start=started):
    fused, (state, counters) = start(kind)
    restore(fused, state, counters)
    return fused


def advance(fused, until):
    """Trains until so many environment steps, and returns the records on the way."""
    records = []
    while fused.env_steps < until:
        records.append(fused.advance(until))
    return records


def comparable(tree):
    def numbers(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(lambda x: np.asarray(numbers(x)), tree)


def assert_equal(left, right):
    """Checks that two trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, comparable(left), comparable(right))


def assert_differ(left, right):
    with pytest.raises(AssertionError):
        assert_equal(left, right)


@pytest.mark.parametrize("kind", AGENTS)
def test_a_run_resumed_half_way_ends_bit_for_bit_where_the_whole_run_does(kind):
    """The state is restored into a new object, which trains in chunks of other lengths."""
    half, whole = 10 * CHUNK, 20 * CHUNK
    fused = fresh(kind)
    advance(fused, whole)
    expected, expected_counters = snapshot(fused)

    fused = fresh(kind)
    for until in (CHUNK, 2 * CHUNK, 7 * CHUNK - 5, half):
        advance(fused, until)
    state, counters = snapshot(fused)
    assert_differ(state["learner"].params, expected["learner"].params)

    resumed = make(kind)
    restore(resumed, state, counters)
    advance(resumed, whole)
    assert resumed.counters == expected_counters
    assert_equal(resumed.state, expected)


@pytest.mark.parametrize(("kind", "num_devices"), [("pqn", 3), ("prioritised", 3), ("prioritised", 1)])
def test_seeds_trained_side_by_side_equal_separate_runs(kind, num_devices, monkeypatch):
    """Be it that each device has one seed, or that one device trains all of them as one batch."""
    steps = 8 * CHUNK
    if num_devices == 1:
        monkeypatch.setattr(program_on_devices, "num_shards", lambda num_seeds, available: 1)
        together = make(kind, seed=5, num_seeds=3)
    else:
        together = fresh(kind, started_with_seeds)
    assert len(jax.tree.leaves(together.params)[0].sharding.device_set) == num_devices
    advance(together, steps)
    params = []
    for i in (0, 2):
        alone = make(kind, seed=5 + i)
        advance(alone, steps)
        assert alone.counters == together.counters
        of_seed = jax.tree.map(lambda x, i=i: x[i], together.params)
        params.append(of_seed)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), of_seed, alone.params)
        returns = together.evaluate(5).returns[i]
        np.testing.assert_allclose(returns, alone.evaluate(5).returns[0], rtol=1e-2, atol=1e-3)
    assert_differ(params[0], params[1])


def optimiser_steps(fused):
    """Returns the learner steps that the optimiser itself has counted."""
    counts = {int(x) for x in jax.tree.leaves(fused.state["learner"].optimiser_state) if x.dtype == jnp.int32}
    (count,) = counts
    return count


@pytest.mark.parametrize("num_envs", [NUM_ENVS, 7])
def test_learner_steps_follow_env_steps_whatever_the_number_of_lanes(num_envs):
    fused = fresh("uniform") if num_envs == NUM_ENVS else make("uniform", num_envs=num_envs)
    agent = AGENTS["uniform"]
    for until in (30, 500, 1234, 3000):
        *_, last = advance(fused, until)
        expected = max(0, math.floor((fused.env_steps - agent.warmup_env_steps) / agent.env_steps_per_learner_step))
        assert fused.env_steps % (num_envs * ROWS) == 0
        assert fused.learner_steps == last.learner_steps == optimiser_steps(fused) == expected
        assert int(fused.state["learner"].target_age) == expected % agent.target_update_period


def test_a_fraction_of_an_env_step_per_learner_step_adds_up():
    fused = fresh("prioritised")
    advance(fused, 50 * CHUNK)
    assert fused.learner_steps == optimiser_steps(fused) == math.floor((50 * CHUNK - 50) / 2.5)


def test_nothing_is_learned_before_the_warm_up_ends():
    fused = fresh("uniform")
    first, _ = snapshot(fused)
    records = advance(fused, 3 * CHUNK)
    assert fused.learner_steps == sum(record.new_learner_steps for record in records) == 0
    assert all(record.loss is None and record.td_error_mean is None for record in records)
    assert_equal(fused.state["learner"], first["learner"])
    (record,) = advance(fused, 3 * CHUNK + 1)
    assert record.new_learner_steps == CHUNK // 6
    assert record.loss is not None and record.loss > 0
    assert_differ(fused.params, first["learner"].params)


def test_without_replay_every_rollout_is_learned_from_as_often_as_configured():
    fused = fresh("pqn")
    records = advance(fused, 5 * CHUNK)
    assert fused.learner_steps == optimiser_steps(fused) == 5 * 2 * 4  # rollouts, epochs, minibatches
    assert sum(record.new_env_steps for record in records) == fused.env_steps == 5 * CHUNK


@pytest.mark.parametrize("kind", ["pqn", "prioritised"])
def test_evaluating_does_not_disturb_training(kind):
    fused = fresh(kind)
    advance(fused, 8 * CHUNK)
    undisturbed, _ = snapshot(fused)
    fused = fresh(kind)
    for until in (CHUNK, 3 * CHUNK, 8 * CHUNK):
        fused.evaluate(5)
        advance(fused, until)
        fused.evaluate(7, batch=1)
    assert_equal(fused.state, undisturbed)


def test_evaluations_repeat_exactly_and_batches_show_other_episodes():
    fused = fresh("pqn")
    advance(fused, CHUNK)
    first = fused.evaluate(5).returns
    assert first.shape == (1, 5)
    np.testing.assert_array_equal(fused.evaluate(5).returns, first)
    longer = fused.evaluate(12).returns
    assert longer.shape == (1, 12)
    np.testing.assert_array_equal(longer[:, :5], first)
    assert len(np.unique(longer)) == 12
    np.testing.assert_array_equal(fused.evaluate(5, batch=1).returns, longer[:, 5:10])


def test_an_evaluation_can_be_stopped_and_can_cut_episodes(monkeypatch):
    monkeypatch.setattr(evaluation, "FIRST_PIECE_STEPS", 1)
    fused = make("pqn", num_seeds=2)
    assert fused.evaluate(7, should_stop=lambda: True) is None
    cut = fused.evaluate(7, max_episode_steps=2)
    assert cut.lengths.shape == cut.first_values.shape == (2, 7) and cut.was_cut.any()
    np.testing.assert_array_equal(cut.lengths[cut.was_cut], 2)
    assert not fused.evaluate(7).was_cut.any()


def test_counters_far_beyond_32_bits_go_on():
    """Exploration has ended, learner steps continue at their rate, and evaluation still derives a key."""
    fused = fresh("uniform")
    advance(fused, 5 * CHUNK)
    state, counters = snapshot(fused)
    far = 2**40 // CHUNK * CHUNK
    restore(fused, state, counters | {"env_steps": far, "learner_steps": 2**35})
    (record,) = advance(fused, far + CHUNK)
    assert record.env_steps == far + CHUNK
    assert record.exploration == pytest.approx(AGENTS["uniform"].exploration_end)
    assert record.new_learner_steps in (CHUNK // 6, CHUNK // 6 + 1)
    assert record.learner_steps == 2**35 + record.new_learner_steps
    assert np.all(np.isfinite(fused.evaluate(5).returns))


def test_a_run_resumed_without_its_replay_warms_up_anew():
    fused = fresh("uniform")
    advance(fused, 5 * CHUNK)
    state, counters = snapshot(fused)
    del state["replay"]
    resumed = make("uniform", checkpoint_replay=False)
    assert "replay" not in resumed.state
    restore(resumed, state, counters)
    advance(resumed, 8 * CHUNK)
    assert_equal(resumed.state["learner"], state["learner"])
    advance(resumed, 9 * CHUNK)
    assert resumed.learner_steps - counters["learner_steps"] == CHUNK // 6
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(resumed.params))


def test_progress_tells_of_the_episodes_that_ended():
    """In one lane, each episode takes five rows with reward 1 and a sixth row for the final observation."""
    fused = make("pqn", env=probes.time_limit(5), num_envs=1)
    records = [fused.advance((i + 1) * ROWS) for i in range(6)]
    num_rows = 6 * ROWS
    assert sum(record.num_episodes for record in records) == (num_rows + 1) // 6
    ended = [record for record in records if record.num_episodes]
    assert {record.episode_return_mean for record in ended} == {5.0}
    assert {record.episode_length_mean for record in ended} == {5.0}


def countdown():
    """Returns an environment without an end whose reward is NaN once, after a random number of steps."""

    def reset(key):
        return jax.random.randint(key, (), 10, 200), jnp.zeros(1)

    def step(state, action, key):
        reward = jnp.where(state == 1, jnp.nan, 0.0)
        return StepResult(state - 1, jnp.zeros(1), reward, jnp.bool_(False), jnp.bool_(False))

    return InGraphEnv(
        EnvSpec(name="countdown", observation_shape=(1,), observation_dtype=np.dtype(np.float32), num_actions=2),
        reset,
        step,
    )


def test_the_first_reward_that_is_not_a_number_is_reported_where_it_came_from():
    """All of it happens in one long chunk, in which every lane gets such a reward."""
    fused = make("uniform", env=countdown(), seed=7)
    rows = np.asarray(fused.state["actor"]["lanes"].env_state) - 1  # the row of each lane's NaN, from 0
    lane = int(np.argmin(rows))
    fused._seconds_per_iteration = 1e-9
    with pytest.raises(RunFailed, match=f"countdown .* step {rows[lane] * NUM_ENVS + lane} in lane {lane} of seed 7$"):
        fused.advance(20 * CHUNK)


def test_of_many_seeds_the_one_that_failed_is_named():
    fused = make("pqn", env=countdown(), seed=8, num_seeds=3)
    rows = np.asarray(fused.state["actor"]["lanes"].env_state) - 1  # [seeds, lanes]
    chunks = rows.min(axis=1) // ROWS
    assert np.sum(chunks == chunks.min()) == 1 and np.argmin(chunks) != 0, "choose seeds that fail apart"
    seed = int(np.argmin(chunks))
    lane = int(np.argmin(rows[seed]))
    for i in range(chunks[seed]):
        fused.advance((i + 1) * CHUNK)
    env_step = rows[seed, lane] * NUM_ENVS + lane
    with pytest.raises(RunFailed, match=f"step {env_step} in lane {lane} of seed {8 + seed}$"):
        fused.advance((chunks[seed] + 1) * CHUNK)


def test_an_observation_that_is_not_a_number_is_reported_with_the_step_that_led_to_it():
    def step(state, action, key):
        observation = jnp.where(state == 4, jnp.inf, 0.0)[None]
        return StepResult(state + 1, observation, jnp.float32(0), jnp.bool_(False), jnp.bool_(False))

    env = probes.constant_reward()._replace(reset=lambda key: (jnp.int32(0), jnp.zeros(1)), step=step)
    with pytest.raises(RunFailed, match=f"environment step {4 * NUM_ENVS} in lane 0"):
        make("pqn", env=env).advance(CHUNK)


@pytest.mark.parametrize(
    ("num_rows", "num_lanes", "num_minibatches"),
    [(2, 1, 2), (1, 2, 2), (4, 3, 3), (16, 4, 4), (6, 35, 7), (4, 6, 8), (16, 2**13, 8)],
)
def test_each_epoch_visits_every_sample_once_in_an_order_of_its_own(num_rows, num_lanes, num_minibatches):
    samples = jnp.arange(num_rows * num_lanes).reshape(num_rows, num_lanes)
    batch = Regression(samples, samples, samples.astype(jnp.float32), samples)
    cut = jax.jit(lambda key: updates.minibatches(batch, key, num_minibatches))
    group = updates.lanes_per_group(num_rows, num_minibatches)
    orders = []
    for seed in range(3):
        minibatches = cut(jax.random.key(seed))
        assert minibatches.action.shape == (num_minibatches, samples.size // num_minibatches)
        np.testing.assert_array_equal(np.sort(minibatches.action.reshape(-1)), np.arange(samples.size))
        np.testing.assert_array_equal(minibatches.target, minibatches.action)
        groups = np.sort(minibatches.action % num_lanes // group, axis=1).reshape(num_minibatches, -1)
        np.testing.assert_array_equal(
            groups,
            np.repeat(np.arange(num_lanes // group), num_rows * group // num_minibatches)[None].repeat(
                num_minibatches, 0
            ),
        )
        orders.append(minibatches.action)
    if samples.size > 2:
        assert not np.array_equal(orders[0], orders[1]) or not np.array_equal(orders[0], orders[2])


def test_checkpoints_of_agents_that_only_see_keep_the_names_of_their_arrays():
    """Runs go on from checkpoints that were saved before agents remembered more than frames."""
    names = {path[0] for path in named_leaves(fresh("pqn").state["actor"])}
    assert names == {"lanes", "view", "episode_return"}


@pytest.mark.parametrize("kind", ["pqn", "prioritised"])
def test_a_kept_learner_stays_while_the_others_train_on(kind):
    fused, free = make(kind, seed=5, num_seeds=3), fresh(kind, started_with_seeds)
    for each in (fused, free):
        advance(each, 4 * CHUNK)
    fused.keep(1)
    before = jax.device_get(fused.params)
    for each in (fused, free):
        advance(each, 8 * CHUNK)
    after, expected = jax.device_get((fused.params, free.params))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[1]), after, before)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]]), after, expected)
    assert any(np.any(x[1] != y[1]) for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True))
    jax.tree.map(np.testing.assert_array_equal, fused.state["learner"].params, after)
    assert fused.evaluate(5).returns.shape == (3, 5)
