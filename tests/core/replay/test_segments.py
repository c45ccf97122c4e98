"""Compares a ring of several segments, each written at its own pace, with separate rings of one segment each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qfleet.config import AgentConfig
from qfleet.core.replay import CONTINUED, NO_STEP, TERMINATED, TRUNCATED, DrawShare, Row, make_replay, outcome_of
from qfleet.core.replay.replay import MIN_PRIORITY
from qfleet.core.types import EnvSpec

NUM_SEGMENTS, NUM_TOGETHER, NUM_ROWS, N_STEP, FRAME_STACK = 3, 2, 12, 3, 2
EXPONENT, BETA = 0.7, 0.6
PACES = (40, 7, 23)
"""Rows inserted into each segment. One segment wraps several times, and one is never full."""


def spec_of(frame_stack=FRAME_STACK):
    return EnvSpec(
        name="stream",
        observation_shape=(),
        observation_dtype=np.dtype(np.float32),
        num_actions=3,
        frame_stack=frame_stack,
    )


def make(num_segments, kind="prioritised", batch_size=64, n_step=N_STEP, frame_stack=FRAME_STACK):
    num_lanes = num_segments * NUM_TOGETHER
    config = AgentConfig(
        replay=kind,
        n_step=n_step,
        batch_size=batch_size,
        priority_exponent=EXPONENT,
        replay_capacity=NUM_ROWS * num_lanes,
    )
    return make_replay(spec_of(frame_stack), config, num_lanes, num_segments=num_segments)


def rows_of(segment, num_rows):
    """Yields rows in which every observation is a number of its own: 10,000 per segment, 1,000 per lane, 1 per row."""
    random = np.random.default_rng(segment)
    final = np.zeros(NUM_TOGETHER, bool)
    for t in range(num_rows):
        terminated, truncated = random.random((2, NUM_TOGETHER)) < 0.15
        terminated, truncated = terminated & ~final, truncated & ~final
        row = Row(
            obs=np.float32(10_000 * (segment + 1) + 1_000 * np.arange(NUM_TOGETHER) + t + 1),
            action=random.integers(3, size=NUM_TOGETHER).astype(np.int32),
            reward=random.normal(size=NUM_TOGETHER).astype(np.float32),
            outcome=np.asarray(outcome_of(terminated, truncated, final)),
        )
        final = terminated | truncated
        yield row, random.uniform(0, 2, NUM_TOGETHER).astype(np.float32)


@functools.cache
def filled(kind="prioritised"):
    """Returns one replay of all segments, and one for each segment, that were fed the same rows."""
    together, alone = make(NUM_SEGMENTS, kind), make(1, kind)
    insert, insert_alone = jax.jit(together.insert), jax.jit(alone.insert)
    state, states = together.init(), [alone.init() for _ in range(NUM_SEGMENTS)]
    streams = [iter(rows_of(k, PACES[k])) for k in range(NUM_SEGMENTS)]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(NUM_SEGMENTS), PACES))
    for k in order:
        row, td_error = next(streams[k])
        state = insert(state, row, jnp.int32(k), td_error)
        states[k] = insert_alone(states[k], row, 0, td_error)
    return together, state, alone, states


def lanes_of(k):
    return slice(k * NUM_TOGETHER, (k + 1) * NUM_TOGETHER)


def test_each_segment_is_as_if_it_were_alone():
    together, state, alone, states = filled()
    for k, own in enumerate(states):
        jax.tree.map(
            lambda a, b, k=k: np.testing.assert_array_equal(a[:, lanes_of(k)], b), state.ring.rows, own.ring.rows
        )
        np.testing.assert_array_equal(together.leaves(state)[:, lanes_of(k)], alone.leaves(own))
        for field in ("cursor", "size", "insertions"):
            assert getattr(state.ring, field)[k] == getattr(own.ring, field)[0] or field == "insertions", field
            assert int(state.ring.insertions[k]) == PACES[k]
        assert state.num_expiring[k] == own.num_expiring[0]
    assert state.num_transitions[0] == sum(int(own.num_transitions[0]) for own in states)
    assert state.max_priority == max(own.max_priority for own in states)


@pytest.mark.parametrize("kind", ["prioritised", "uniform"])
def test_a_batch_from_all_segments_holds_what_batches_from_each_would(kind):
    together, state, alone, states = filled(kind)
    sample, sample_alone = jax.jit(together.sample), jax.jit(alone.sample)
    allowed = {}
    for i in range(40):
        for own in states:
            transition = jax.device_get(sample_alone(own, jax.random.key(i), BETA).transition)
            allowed |= {obs[-1]: jax.tree.map(lambda x, j=j: x[j], transition) for j, obs in enumerate(transition.obs)}
    seen = set()
    for i in range(40):
        transition = jax.device_get(sample(state, jax.random.key(i), BETA).transition)
        for j, obs in enumerate(transition.obs):
            expected, drawn = allowed[obs[-1]], jax.tree.map(lambda x, j=j: x[j], transition)
            seen.add(obs[-1])
            for field in ("obs", "action", "reward", "discount", "next_obs"):
                np.testing.assert_array_equal(getattr(drawn, field), getattr(expected, field))
    assert seen == set(allowed)


def test_uniform_draws_are_even_over_segments_of_any_fill():
    together, state, _, _ = filled("uniform")
    sample = jax.jit(together.sample)
    drawn = np.concatenate([sample(state, jax.random.key(i), BETA).transition.obs[:, -1] for i in range(100)])
    counts = np.unique(drawn, return_counts=True)[1]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_transitions_enter_with_the_errors_that_come_with_them():
    """The error that comes with a row belongs to the transition that the row completes. NaN means unknown."""
    replay = make(1, frame_stack=1)
    state = replay.init()
    errors = np.full((NUM_ROWS, NUM_TOGETHER), np.nan, np.float32)
    errors[5:7] = [[0.5, 3.0], [0.25, np.nan]]
    for t in range(8):
        row = Row(np.zeros(2, np.float32), np.zeros(2, np.int32), np.zeros(2, np.float32), np.full(2, CONTINUED))
        state = jax.jit(replay.insert)(state, row, 0, errors[t])
    highest = (3.0 + MIN_PRIORITY) ** EXPONENT
    expected = np.ones((5, 2))
    expected[5 - N_STEP] = [(0.5 + MIN_PRIORITY) ** EXPONENT, highest]
    expected[6 - N_STEP] = [(0.25 + MIN_PRIORITY) ** EXPONENT, highest]
    expected[7 - N_STEP] = highest  # greater than the initial 1
    np.testing.assert_allclose(replay.leaves(state)[:5], expected, rtol=1e-6)
    np.testing.assert_allclose(state.max_priority, highest, rtol=1e-6)


def test_late_errors_of_one_segment_are_kept_out_by_its_own_rows_only():
    together, state, _, _ = filled()
    insert, set_priorities = jax.jit(together.insert), jax.jit(together.set_priorities)
    sample = jax.jit(together.sample)(state, jax.random.key(0), BETA)
    for row, _ in rows_of(9, NUM_ROWS):  # all of the first segment is overwritten
        state = insert(state, row, jnp.int32(0), jnp.full(NUM_TOGETHER, jnp.nan))
    before = together.leaves(state)
    after = together.leaves(set_priorities(state, sample, jnp.full(64, 7.0)))
    np.testing.assert_array_equal(before[:, lanes_of(0)], after[:, lanes_of(0)])
    drawn = {int(slot) for slot in sample.slot if slot % (NUM_SEGMENTS * NUM_TOGETHER) >= NUM_TOGETHER}
    assert drawn
    for slot in drawn:
        np.testing.assert_allclose(after.reshape(-1)[slot], (7 + MIN_PRIORITY) ** EXPONENT, rtol=1e-6)


GO, END, CUT, LAST = (int(outcome) for outcome in (CONTINUED, TERMINATED, TRUNCATED, NO_STEP))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([GO, GO, GO], [GO, CUT, LAST]),
        ([GO, GO, END], [GO, CUT, LAST]),  # its next observation was never seen; its row ends the next stack
        ([GO, END, LAST], [GO, END, LAST]),
        ([END, LAST, GO], [END, LAST, LAST]),
    ],
)
def test_a_lost_writers_newest_steps_become_final_observations(before, after):
    replay = make(NUM_SEGMENTS)
    state = replay.init()
    for outcome in before:
        row = Row(np.ones(2, np.float32), np.zeros(2, np.int32), np.ones(2, np.float32), np.full(2, outcome, np.uint8))
        for k in range(NUM_SEGMENTS):
            state = replay.insert(state, row, k)
    outcomes = np.asarray(replay.cut(state, jnp.int32(1)).ring.rows.outcome)
    np.testing.assert_array_equal(outcomes[:3, lanes_of(1)].T, [after] * 2)
    for k in (0, 2):
        np.testing.assert_array_equal(outcomes[:3, lanes_of(k)].T, [before] * 2)


def test_nothing_crosses_a_cut():
    """Observations are below 100 before the cut and above 100 after it. No transition holds both."""
    replay = make(1)
    insert, state = jax.jit(replay.insert), replay.init()
    for t in range(NUM_ROWS):
        if t == 6:
            state = jax.jit(replay.cut)(state, jnp.int32(0))
        obs = np.full(2, t + 1 + 100 * (t >= 6), np.float32)
        row = Row(obs, np.zeros(2, np.int32), np.where(obs > 100, 100, 1).astype(np.float32), np.full(2, CONTINUED))
        state = insert(state, row, 0, np.full(2, np.nan, np.float32))
    starts = set()
    for i in range(20):
        transition = jax.device_get(jax.jit(replay.sample)(state, jax.random.key(i), BETA).transition)
        frames = np.concatenate([transition.obs, transition.next_obs], axis=1)
        is_old = (frames < 100) & (frames > 0)
        assert np.all(np.any(is_old, axis=1) != np.any(frames > 100, axis=1))
        np.testing.assert_array_equal(transition.reward > 50, np.any(frames > 100, axis=1))
        starts |= set(transition.obs[:, -1])
    assert {4.0, 5.0} < starts  # the last two steps before the cut are still learned from
    assert 6.0 not in starts


def test_several_replays_are_drawn_from_as_if_they_were_one():
    """Each segment's own replay draws its share of the batch, with the probabilities and weights of a single replay."""
    together, state, alone, states = filled()
    totals = np.array([float(jnp.sum(alone.leaves(own))) for own in states])
    num_transitions = sum(int(own.num_transitions[0]) for own in states)
    sample_share = jax.jit(alone.sample_share, static_argnums=5)
    random = np.random.default_rng(0)
    weights, counts = {}, {}
    num_batches, batch_size = 400, 60
    for _ in range(num_batches):
        ends = np.floor(np.cumsum(totals / totals.sum()) * batch_size + random.random()).astype(int)
        ends[-1] = batch_size
        for own, num, total in zip(states, np.diff(ends, prepend=0), totals, strict=True):
            part = DrawShare(jnp.int32(num), jnp.float32(total / totals.sum()), jnp.float32(num_transitions))
            for first in range(0, num, 16):  # in turns
                key = jax.random.key(random.integers(2**31))
                turn = sample_share(own, key, BETA, part, first, 16)
                assert np.sum(turn.is_mine) == min(16, num - first)
                drawn = jax.tree.map(lambda x, turn=turn: np.asarray(x)[turn.is_mine], turn.transition)
                for obs, weight in zip(drawn.obs[:, -1], drawn.weight, strict=True):
                    counts[obs] = counts.get(obs, 0) + 1
                    weights[obs] = weight
    leaves = np.asarray(together.leaves(state))
    shares = zip(np.asarray(state.ring.rows.obs).ravel(), (leaves / leaves.sum()).ravel(), strict=True)
    probability = {obs: p for obs, p in shares if p > 0}
    assert set(counts) == set(probability)
    expected = np.array([probability[obs] for obs in sorted(counts)], np.float64)
    observed = np.array([counts[obs] for obs in sorted(counts)], np.float64)
    assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-4
    found = [weights[obs] for obs in sorted(counts)]
    np.testing.assert_allclose(found, (num_transitions * expected) ** -BETA, rtol=1e-4)
