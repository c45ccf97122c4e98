"""Compares the replay with a slow one in plain Python that is fed the same stream."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.replay import Row, make_replay, outcome_of, priorities
from qfleet.core.replay.replay import MIN_PRIORITY
from qfleet.core.replicas import over_axis
from qfleet.core.types import EnvSpec

NUM_ROWS = 12
DISCOUNT = 0.9
EXPONENT = 0.7
BETA = 0.6
SMALLEST_P = 1e-4

CASES = [
    # replay, n_step, frame_stack, lanes, dtype, replicas, importance_normalisation
    ("uniform", 1, 1, 3, np.float32),
    ("uniform", 3, 1, 1, np.uint8),
    ("uniform", 5, 4, 3, np.uint8),
    ("uniform", 1, 4, 1, np.float32),
    ("prioritised", 1, 1, 3, np.uint8),
    ("prioritised", 3, 1, 3, np.float32),
    ("prioritised", 5, 4, 3, np.uint8),
    ("prioritised", 1, 4, 1, np.float32),
    ("prioritised", 5, 1, 1, np.float32, 1, "batch_max"),
    # Over replicas, each with a share of the lanes and of every batch.
    ("uniform", 3, 4, 4, np.uint8, 2),
    ("uniform", 1, 1, 8, np.float32, 8),
    ("prioritised", 3, 4, 4, np.uint8, 2),
    ("prioritised", 5, 1, 4, np.float32, 4, "batch_max"),
    ("prioritised", 1, 1, 8, np.uint8, 8),
]


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def rows_of(stream, dtype):
    """Returns the stream as rows of a replay, `[rows, lanes, ...]`."""
    facts = (oracle.columns(stream, field) for field in ("terminated", "truncated", "final"))
    return Row(
        obs=oracle.encode(oracle.columns(stream, "number"), dtype),
        action=oracle.columns(stream, "action").astype(np.int32),
        reward=oracle.columns(stream, "reward").astype(np.float32),
        outcome=np.asarray(outcome_of(*facts)),
    )


class Subject:
    """A replay, its oracle, and the stream that both are fed."""

    def __init__(
        self, kind, n_step, frame_stack, num_lanes, dtype, num_replicas=1, normalisation="none", batch_size=512, seed=0
    ):
        self.is_prioritised = kind == "prioritised"
        self.dtype, self.num_lanes = np.dtype(dtype), num_lanes
        spec = EnvSpec(
            name="stream",
            observation_shape=(2, 2),
            observation_dtype=self.dtype,
            num_actions=5,
            frame_stack=frame_stack,
        )
        config = AgentConfig(
            replay=kind,
            n_step=n_step,
            discount=DISCOUNT,
            batch_size=batch_size,
            priority_exponent=EXPONENT,
            importance_normalisation=normalisation,
            replay_capacity=NUM_ROWS * num_lanes + num_lanes - 1,
        )
        self.num_replicas, self.normalisation = num_replicas, normalisation
        self.replay = make_replay(spec, config, num_lanes, over_axis("data", num_replicas))
        self.stream = oracle.random_stream(seed, 5 * NUM_ROWS, num_lanes)
        self.rows = rows_of(self.stream, self.dtype)
        self.oracle = oracle.OracleReplay(NUM_ROWS, num_lanes, n_step, frame_stack, DISCOUNT)
        self.priorities = oracle.OraclePriorities(self.oracle, EXPONENT, MIN_PRIORITY)

    def row(self, t):
        return at(self.rows, t)

    def start_of(self, number):
        """Returns the time and the lane of the observation with this number."""
        return divmod(int(number) - 1, self.num_lanes)

    def frames(self, observations):
        """Returns the numbers of the frames in `[..., 2, 2]` observations or stacks of them, `[..., frame_stack]`."""
        if self.oracle.frame_stack == 1:
            return oracle.decode(observations)[..., None]
        return oracle.decode(np.moveaxis(observations, -1, -3))

    def starts(self, sample):
        """Returns the time and the lane at which each transition of a batch starts, read from its observation."""
        return [self.start_of(number) for number in self.frames(np.asarray(sample.transition.obs))[:, -1]]


def error_of(number, t):
    """Returns a TD error above 0 that depends only on the transition and the time, as a network's would."""
    return 0.05 + (number * 37 % 11) * (t * 13 % 7)


@functools.cache
def recorded(*case):
    """Runs through the whole stream in one scan. After each row a batch is drawn, and its priorities are set.

    Returns the subject, the samples `[rows, batch, ...]` and, if prioritised, the leaves of the tree after each row.
    """
    subject = Subject(*case)
    replay = subject.replay
    newest_byte = (..., 0, 0) if subject.oracle.frame_stack == 1 else (..., 0, 0, -1)
    second_byte = (..., 0, 1) if subject.oracle.frame_stack == 1 else (..., 0, 1, -1)

    def step(state, inputs):
        t, row, key = inputs
        state = replay.insert(state, row)
        leaves = replay.leaves(state)
        sample = replay.sample(state, key, jnp.float32(BETA))
        obs = sample.transition.obs.astype(jnp.int32)
        number = obs[newest_byte] + 256 * obs[second_byte]
        is_ready = t >= subject.oracle.n_step
        state = jax.lax.cond(
            is_ready,
            lambda state: replay.set_priorities(state, sample, error_of(number, t).astype(jnp.float32)),
            lambda state: state,
            state,
        )
        return state, (sample._replace(slot=(), is_mine=(), insertions=()), leaves)

    num_rows = len(subject.stream)
    inputs = (jnp.arange(num_rows), subject.rows, jax.random.split(jax.random.key(1), num_rows))

    def run(inputs):
        return jax.lax.scan(step, replay.init(), inputs)[1]

    if subject.num_replicas > 1:
        if subject.num_replicas > jax.device_count():
            pytest.skip(f"needs {subject.num_replicas} devices")
        mesh = jax.make_mesh((subject.num_replicas,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        lanes = jax.P(None, "data")
        shares = (lanes, jax.P(None, None, "data"))  # how each row's batch and its leaves are divided
        run = jax.shard_map(run, mesh=mesh, in_specs=((jax.P(), lanes, jax.P()),), out_specs=shares, check_vma=False)
    samples, leaves = jax.device_get(jax.jit(run)(inputs))
    return subject, samples, leaves


def replayed(subject, samples):
    """Feeds the oracle row by row, and yields the time, the transitions it allows, and the batch drawn at that time."""
    subject.oracle.history.clear()
    for t, row in enumerate(subject.stream):
        subject.oracle.insert(row)
        drawable = subject.oracle.drawable(forgets_early=subject.is_prioritised)
        if drawable:
            yield t, drawable, at(samples, t)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sampled_transition_is_found_in_the_oracle(case):
    """All of its fields belong to one transition, whatever the fill of the ring, the ends of episodes and the lanes."""
    subject, samples, _ = recorded(*case)
    for _, drawable, sample in replayed(subject, samples):
        allowed = {start: subject.oracle.transition(*start) for start in drawable}
        transition = sample.transition
        expected = [allowed[start] for start in subject.starts(sample)]
        assert transition.obs.dtype == transition.next_obs.dtype == subject.dtype
        np.testing.assert_array_equal(subject.frames(transition.obs), [e.frames for e in expected])
        np.testing.assert_array_equal(transition.action, [e.action for e in expected])
        np.testing.assert_allclose(transition.reward, [e.reward for e in expected], atol=1e-6)
        np.testing.assert_allclose(transition.discount, [e.discount for e in expected], rtol=1e-6)
        np.testing.assert_array_equal(subject.frames(transition.next_obs), [e.next_frames for e in expected])


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "uniform"], ids=str)
def test_every_transition_is_drawn_and_equally_often(case):
    subject, samples, _ = recorded(*case)
    statistic, freedom = 0.0, 0
    for _, drawable, sample in replayed(subject, samples):
        counts = count(subject.starts(sample), drawable)
        assert np.all(counts > 0)
        np.testing.assert_array_equal(sample.transition.weight, 1)
        statistic += chi_square(counts, np.full(len(drawable), 1 / len(drawable)))
        freedom += len(drawable) - 1
    assert stats.chi2.sf(statistic, freedom) > SMALLEST_P


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "prioritised"], ids=str)
def test_draws_and_weights_follow_the_priorities_of_the_oracle(case):
    subject, samples, leaves = recorded(*case)
    known = oracle.OraclePriorities(subject.oracle, EXPONENT, MIN_PRIORITY)
    subject.oracle.history.clear()
    statistic, freedom = 0.0, 0
    for t, row in enumerate(subject.stream):
        known.insert(row)
        np.testing.assert_allclose(leaves[t].reshape(-1), known.leaves(), rtol=1e-5)
        drawable = sorted(known.of)
        if not drawable:
            continue
        sample = at(samples, t)
        starts = subject.starts(sample)
        priority = np.array([known.of[start] for start in drawable])
        probability = priority / priority.sum()
        statistic += chi_square(count(starts, drawable), probability)
        freedom += len(drawable) - 1

        of_start = dict(zip(drawable, probability, strict=True))
        drawn = np.array([of_start[start] for start in starts])
        weight = (len(drawable) * drawn) ** -BETA
        divisor = weight.max() if subject.normalisation == "batch_max" else 1
        np.testing.assert_allclose(sample.transition.weight, weight / divisor, rtol=1e-4)
        known.set({s: error_of(s[0] * subject.num_lanes + s[1] + 1, t) for s in starts})
    # Draws are stratified, so the counts vary less than those of independent draws. Too even counts are no fault.
    assert stats.chi2.sf(statistic, freedom) > SMALLEST_P


def count(starts, drawable):
    place = {start: i for i, start in enumerate(drawable)}
    return np.bincount([place[start] for start in starts], minlength=len(drawable))


def chi_square(counts, probability):
    expected = counts.sum() * probability
    return np.sum((counts - expected) ** 2 / expected)


LATE_CASES = [
    ("prioritised", 1, 1, 3, np.float32),
    ("prioritised", 3, 4, 2, np.uint8),
    ("prioritised", 5, 1, 1, np.uint8),
]


@pytest.mark.parametrize("case", LATE_CASES, ids=str)
def test_late_priorities_reach_what_is_left_and_never_a_newcomer(case):
    """A batch is drawn, rows are inserted, and only then are its errors set.

    This is tried at every fill and every delay. In every second run the counter of insertions wraps on the way.
    """
    subject = Subject(*case, batch_size=64)
    replay = subject.replay
    insert, sample_batch = jax.jit(replay.insert), jax.jit(replay.sample)
    set_priorities = jax.jit(replay.set_priorities)
    get_leaves = jax.jit(lambda state: priorities.get_leaves(state.tree, jnp.arange(NUM_ROWS * subject.num_lanes)))
    init = replay.init()
    rows = [subject.row(t) for t in range(len(subject.stream))]
    fills = (subject.oracle.n_step + 1, NUM_ROWS - 2, NUM_ROWS, 2 * NUM_ROWS + 5)
    for num_before, counter in itertools.product(fills, (0, 2**32 - 2 * NUM_ROWS)):
        state = init._replace(ring=init.ring._replace(insertions=jnp.array([counter], jnp.uint32)))
        known = oracle.OraclePriorities(subject.oracle, EXPONENT, MIN_PRIORITY)
        subject.oracle.history.clear()
        for t in range(num_before):
            state = insert(state, rows[t])
            known.insert(subject.stream[t])
        sample = sample_batch(state, jax.random.key(num_before), jnp.float32(BETA))
        starts = subject.starts(sample)
        errors = {start: 2.0 + 0.1 * start[0] + 0.01 * start[1] for start in starts}
        for num_later in range(2 * NUM_ROWS + 3):
            late = set_priorities(state, sample, jnp.array([errors[start] for start in starts], jnp.float32))
            known_late = oracle.OraclePriorities(subject.oracle, EXPONENT, MIN_PRIORITY)
            known_late.of = dict(known.of)
            known_late.set(errors)
            np.testing.assert_allclose(get_leaves(late), known_late.leaves(), rtol=1e-6, err_msg=f"{num_later} later")
            state = insert(state, rows[num_before + num_later])
            known.insert(subject.stream[num_before + num_later])


def test_new_transitions_enter_at_the_greatest_priority_so_far():
    subject = Subject("prioritised", 1, 1, 1, np.float32, batch_size=8)
    replay, known = subject.replay, subject.priorities
    insert, draw = jax.jit(replay.insert), jax.jit(replay.sample)
    state = replay.init()
    for t in range(3):
        state = insert(state, subject.row(t))
        known.insert(subject.stream[t])
    sample = draw(state, jax.random.key(0), jnp.float32(BETA))
    state = jax.jit(replay.set_priorities)(state, sample, jnp.full(8, -9.0))
    known.set(dict.fromkeys(subject.starts(sample), -9.0))
    assert known.greatest == pytest.approx(9**EXPONENT, rel=1e-5)
    for t in range(3, 6):
        state = insert(state, subject.row(t))
        known.insert(subject.stream[t])
    np.testing.assert_allclose(priorities.get_leaves(state.tree, jnp.arange(NUM_ROWS)), known.leaves(), rtol=1e-5)


def test_exponent_zero_is_uniform_replay():
    """With equal priorities all weights are 1, so learning takes the same steps as with uniform replay."""
    subject = Subject("prioritised", 1, 1, 3, np.float32, batch_size=8)
    insert, draw = jax.jit(subject.replay.insert), jax.jit(subject.replay.sample)
    state = subject.replay.init()
    for t in range(NUM_ROWS):
        state = insert(state, subject.row(t))
    weight = draw(state, jax.random.key(0), jnp.float32(1.0)).transition.weight
    np.testing.assert_allclose(weight, 1, rtol=1e-6)


def test_a_replay_without_a_whole_window_gives_nothing_weight():
    """There is no transition to draw, so the learner must not learn from the result."""
    subject = Subject("uniform", 3, 1, 2, np.float32, batch_size=8)
    sample = jax.jit(subject.replay.sample)(subject.replay.init(), jax.random.key(0), jnp.float32(BETA))
    np.testing.assert_array_equal(sample.transition.weight, 0)


@pytest.mark.parametrize("kind", ["uniform", "prioritised"])
def test_seeds_side_by_side_in_one_scan_equal_loops_of_donated_calls(kind):
    """With many seeds in one program, a rejected draw of one seed must not disturb another seed."""
    subjects = [Subject(kind, 3, 4, 2, np.uint8, batch_size=16, seed=seed) for seed in (0, 1)]
    replay, num_rows = subjects[0].replay, 40
    keys = [jax.random.split(jax.random.key(seed), num_rows) for seed in (5, 6)]

    def step(state, inputs):
        row, key = inputs
        state = replay.insert(state, row)
        sample = replay.sample(state, key, jnp.float32(BETA))
        return replay.set_priorities(state, sample, sample.transition.reward), sample

    rows = jax.tree.map(lambda *x: np.stack(x)[:, :num_rows], *(subject.rows for subject in subjects))
    run = jax.jit(jax.vmap(lambda rows, keys: jax.lax.scan(step, replay.init(), (rows, keys))))
    together = jax.device_get(run(rows, jnp.stack(keys)))

    donated_step = jax.jit(step, donate_argnums=0)
    for i in range(2):
        state = jax.tree.map(jnp.copy, replay.init())
        for t in range(num_rows):
            state, sample = donated_step(state, (subjects[i].row(t), keys[i][t]))
            scanned = at(together[1], (i, t))
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), scanned, sample)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), at(together[0], i), state)


@pytest.mark.parametrize(("n_step", "frame_stack", "num_lanes", "fewest"), [(1, 1, 1, 3), (3, 4, 2, 16)])
def test_a_capacity_below_one_window_is_refused_with_one_that_fits(n_step, frame_stack, num_lanes, fewest):
    spec = EnvSpec(
        name="x", observation_shape=(), observation_dtype=np.dtype(np.float32), num_actions=2, frame_stack=frame_stack
    )
    make_replay(spec, AgentConfig(n_step=n_step, replay_capacity=fewest), num_lanes)
    with pytest.raises(ConfigError, match=rf"replay_capacity must hold .* got .*={fewest - 1} .*; try {fewest}$"):
        make_replay(spec, AgentConfig(n_step=n_step, replay_capacity=fewest - 1), num_lanes)


def test_the_smallest_replay_always_has_something_to_draw():
    """Even if every episode takes one step, one of two successive rows holds a step."""
    spec = EnvSpec(
        name="x", observation_shape=(2, 2), observation_dtype=np.dtype(np.uint8), num_actions=2, frame_stack=4
    )
    rows = rows_of(oracle.random_stream(0, 20, 1, end_probability=1.0), np.uint8)
    for kind in ("uniform", "prioritised"):
        replay = make_replay(spec, AgentConfig(replay=kind, replay_capacity=6, batch_size=32), 1)
        insert, sample = jax.jit(replay.insert), jax.jit(replay.sample)
        state = replay.init()
        for t in range(20):
            state = insert(state, at(rows, t))
            if t >= 1:
                weight = sample(state, jax.random.key(t), jnp.float32(0.5)).transition.weight
                assert np.all((weight > 0) & np.isfinite(weight))
