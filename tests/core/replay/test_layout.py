"""A resharded replay holds only transitions of the original streams, and continues as if it had seen them itself."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from qfleet.config import AgentConfig
from qfleet.core.replay import NO_STEP, TRUNCATED, Row, SavedReplay, make_replay, resharded
from qfleet.core.replay.ring import Ring
from qfleet.core.replay.window import Window
from qfleet.core.types import EnvSpec

DISCOUNT, BETA = 0.9, 0.6
UNIFORM, PRIORITISED = "uniform", "prioritised"
FIRST_NEW = 500_000
"""The least number of the observations that are inserted after resharding."""


class Layout(NamedTuple):
    rows: int
    lanes: int
    segments: int = 1

    @property
    def together(self):
        return self.lanes // self.segments


class Case(NamedTuple):
    old: Layout
    paces: tuple  # rows inserted into each old segment
    new: Layout
    kinds: tuple  # old, new
    n_step: int
    frame_stack: int


FLEET, PACES = Layout(12, 6, 3), (40, 7, 23)  # one segment wraps several times, one is never full
FUSED, SMALLEST, WIDE = Layout(40, 2), Layout(8, 4, 4), Layout(64, 8)
CASES = [
    Case(FLEET, PACES, FUSED, (PRIORITISED, PRIORITISED), 3, 4),
    Case(FLEET, PACES, FUSED, (UNIFORM, UNIFORM), 3, 4),
    Case(FLEET, PACES, FUSED, (PRIORITISED, PRIORITISED), 1, 1),
    Case(FLEET, PACES, FLEET, (PRIORITISED, PRIORITISED), 3, 4),
    Case(FLEET, PACES, FLEET, (UNIFORM, PRIORITISED), 3, 1),
    Case(FLEET, PACES, Layout(9, 4, 2), (PRIORITISED, PRIORITISED), 3, 4),
    Case(FLEET, PACES, Layout(9, 4, 2), (PRIORITISED, UNIFORM), 1, 4),
    Case(FLEET, PACES, WIDE, (PRIORITISED, PRIORITISED), 1, 4),
    Case(FLEET, PACES, WIDE, (UNIFORM, UNIFORM), 3, 1),
    Case(FUSED, (107,), FLEET, (PRIORITISED, PRIORITISED), 3, 4),
    Case(FUSED, (107,), FLEET, (UNIFORM, UNIFORM), 1, 1),
    Case(FUSED, (38,), FLEET, (PRIORITISED, PRIORITISED), 1, 4),  # not full, but its first stacks are about to go
    Case(FUSED, (107,), SMALLEST, (PRIORITISED, PRIORITISED), 3, 4),
    Case(FUSED, (107,), SMALLEST, (UNIFORM, UNIFORM), 3, 4),
    Case(FUSED, (33,), SMALLEST, (PRIORITISED, PRIORITISED), 3, 1),
]


@functools.cache
def make(layout, kind, n_step, frame_stack):
    """Returns a replay with `insert` and `sample` jitted. The other functions are called rarely."""
    spec = EnvSpec(
        name="stream",
        observation_shape=(),
        observation_dtype=np.dtype(np.float32),
        num_actions=5,
        frame_stack=frame_stack,
    )
    config = AgentConfig(
        replay=kind, n_step=n_step, discount=DISCOUNT, batch_size=512, replay_capacity=layout.rows * layout.lanes
    )
    replay = make_replay(spec, config, layout.lanes, num_segments=layout.segments)
    return replay._replace(insert=jax.jit(replay.insert), sample=jax.jit(replay.sample))


def stream_of(segment, num_rows, num_together, first=0, end_probability=0.25):
    """Returns a stream in which every observation has a number of its own. Segments are 10,000 apart."""
    steps = oracle.random_stream(segment + first, num_rows, num_together, end_probability)
    first += 10_000 * segment
    return [[dataclasses.replace(step, number=step.number + first) for step in row] for row in steps]


def row_of(steps):
    return Row(
        obs=np.float32([step.number for step in steps]),
        action=np.int32([step.action for step in steps]),
        reward=np.float32([step.reward for step in steps]),
        outcome=np.uint8([step.outcome for step in steps]),
    )


class Past:
    """The history of one old segment, closed at its end, and the part of it that resharding must keep."""

    def __init__(self, stream, num_rows, n_step, frame_stack):
        self.oracle = oracle.OracleReplay(10**6, len(stream[0]), n_step, frame_stack, DISCOUNT)
        self.oracle.history = history = [list(row) for row in stream]
        self.oldest = max(0, len(history) - num_rows)
        self.is_full = len(history) >= num_rows
        for lane, newest in enumerate(history[-1]):
            before = history[-2][lane]
            if not newest.final and before.outcome == oracle.CONTINUED:
                history[-2][lane] = dataclasses.replace(before, truncated=True)
            history[-1][lane] = dataclasses.replace(newest, terminated=False, truncated=False, final=True)

    def transitions(self):
        """Returns every transition of the history, by the number of its first observation."""
        return {
            step.number: self.oracle.transition(t, lane)
            for t, row in enumerate(self.oracle.history)
            for lane, step in enumerate(row)
            if not step.final
        }

    def episodes(self):
        """Returns the episodes to keep if there is room: age of the last row, and numbers of the rows, oldest first."""
        found = []
        for lane in range(self.oracle.num_lanes):
            lacks_frames = self.is_full and self.oracle.frame_stack > 1
            numbers = []
            for t in range(self.oldest, len(self.oracle.history)):
                step = self.oracle.history[t][lane]
                numbers.append(step.number)
                if step.final:
                    if len(numbers) > 1 and not lacks_frames:
                        found.append((len(self.oracle.history) - 1 - t, numbers))
                    numbers, lacks_frames = [], False
        return found


class Outcome(NamedTuple):
    """The result of one case."""

    saved: SavedReplay
    result: SavedReplay
    num_dropped: int
    pasts: list


@functools.cache
def run(case, end_probability=0.25):
    replay = make(case.old, case.kinds[0], case.n_step, case.frame_stack)
    state = replay.init()
    streams = [stream_of(k, pace, case.old.together, 0, end_probability) for k, pace in enumerate(case.paces)]
    random = np.random.default_rng(0)
    order = random.permutation(np.repeat(np.arange(case.old.segments), case.paces))
    left = [iter(stream) for stream in streams]
    for k in order:
        error = random.uniform(0, 2, case.old.together).astype(np.float32)
        state = replay.insert(state, row_of(next(left[k])), jnp.int32(k), error)
    saved = jax.device_get(SavedReplay(state.ring, replay.leaves(state), state.max_priority))
    before = jax.tree.map(np.copy, saved)
    result, num_dropped = resharded(
        saved,
        *case.new,
        window=Window(case.n_step, case.frame_stack),
        is_prioritised=case.kinds[1] == PRIORITISED,
    )
    jax.tree.map(np.testing.assert_array_equal, saved, before)
    pasts = [Past(stream, case.old.rows, case.n_step, case.frame_stack) for stream in streams]
    return Outcome(saved, result, num_dropped, pasts)


def restored(case, result):
    replay = make(case.new, case.kinds[1], case.n_step, case.frame_stack)
    return replay, jax.tree.map(jnp.asarray, replay.restore(result))


def steps_in(ring):
    return set(np.asarray(ring.rows.obs)[np.asarray(ring.rows.outcome) != NO_STEP].astype(int).tolist())


def startable(ring, n_step, frame_stack, forgets_early):
    """Returns where `insert` and the uniform draw start transitions, for cursors of `size % rows`: `[rows, lanes]`."""
    is_startable = np.zeros(ring.rows.outcome.shape, bool)
    for k, size in enumerate(ring.size):
        missing = frame_stack - 1 if size == ring.num_rows else 0
        if forgets_early:
            missing = max(0, int(size) + frame_stack - 1 - ring.num_rows)
        lanes = slice(k * ring.lanes_per_segment, (k + 1) * ring.lanes_per_segment)
        is_startable[missing : max(int(size) - n_step, missing), lanes] = True
    return is_startable & (ring.rows.outcome != NO_STEP)


def assert_allowed(transition, allowed, frame_stack):
    """Asserts that each transition of a batch is one of the allowed ones, and returns where they started."""
    obs, next_obs = (np.asarray(x).reshape(len(x), frame_stack) for x in (transition.obs, transition.next_obs))
    drawn = np.asarray(transition.weight) > 0
    expected = [allowed[number] for number in obs[drawn, -1]]
    np.testing.assert_array_equal(obs[drawn], [e.frames for e in expected])
    np.testing.assert_array_equal(next_obs[drawn], [e.next_frames for e in expected])
    np.testing.assert_array_equal(transition.action[drawn], [e.action for e in expected])
    np.testing.assert_allclose(transition.reward[drawn], [e.reward for e in expected], atol=1e-6)
    np.testing.assert_allclose(transition.discount[drawn], [e.discount for e in expected], rtol=1e-6)
    return set(obs[drawn, -1].astype(int).tolist())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_episodes_are_kept_that_have_their_frames_and_find_room(case):
    """Only the oldest episodes find no room, and only if every lane is full. One per lane may lose its beginning."""
    saved, result, num_dropped, pasts = run(case)
    rows = result.ring.rows.obs[result.ring.rows.obs > 0].astype(int).tolist()
    assert len(rows) == len(set(rows))  # no row occurs twice
    assert num_dropped == len(steps_in(saved.ring)) - len(steps_in(result.ring))
    episodes = sorted(episode for past in pasts for episode in past.episodes())
    kept = [[number for number in numbers if number in rows] for _, numbers in episodes]
    assert sum(len(numbers) for numbers in kept) == len(rows)
    finals = result.ring.rows.obs[(result.ring.rows.outcome == NO_STEP) & (result.ring.rows.obs > 0)]
    assert {numbers[-1] for numbers in kept if numbers} == set(finals.astype(int).tolist())
    for (_, numbers), rest in zip(episodes, kept, strict=True):
        assert rest == numbers[len(numbers) - len(rest) :]
        if 0 < len(rest) < len(numbers):
            assert rest[0] in result.ring.rows.obs[0]
    ages = [[age for (age, _), rest in zip(episodes, kept, strict=True) if bool(rest) == found] for found in (0, 1)]
    if ages[0]:
        assert np.all(result.ring.rows.obs[0] > 0)  # no lane begins with padding, so all are full
        assert max(ages[1]) <= min(ages[0])
    has_room = case.old == FLEET and case.new in (FUSED, FLEET, WIDE)
    assert (kept == [numbers for _, numbers in episodes]) == has_room


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_transition_is_one_of_the_original_streams_and_stays_so(case):
    """Also while later rows overwrite all of them twice, with each segment at its own pace."""
    _, result, _, pasts = run(case)
    replay, state = restored(case, result)
    together, segments = case.new.together, case.new.segments
    allowed = {}
    for past in pasts:
        allowed |= past.transitions()
    streams = [stream_of(k, 2 * case.new.rows + 3, together, FIRST_NEW) for k in range(segments)]
    for stream in streams:
        allowed |= Past(stream, len(stream), case.n_step, case.frame_stack).transitions()
    frame_stack, is_prioritised = case.frame_stack, case.kinds[1] == PRIORITISED

    seen = set()
    for i in range(30):
        sample = replay.sample(state, jax.random.key(i), BETA)
        seen |= assert_allowed(jax.device_get(sample.transition), allowed, frame_stack)
    expected = startable(result.ring, case.n_step, frame_stack, forgets_early=is_prioritised)
    numbers = set(result.ring.rows.obs[expected].astype(int).tolist())
    assert seen <= numbers
    if not is_prioritised:
        assert seen == numbers

    random = np.random.default_rng(1)
    left = [iter(stream) for stream in streams]
    order = random.permutation(np.repeat(np.arange(segments), 2 * case.new.rows))
    for i, k in enumerate(order):
        state = replay.insert(state, row_of(next(left[k])), jnp.int32(k))
        if i % 5 == 0 or i < 8:
            sample = replay.sample(state, jax.random.key(i), BETA)
            assert_allowed(jax.device_get(sample.transition), allowed, frame_stack)
            if is_prioritised:
                assert state.num_transitions[0] == np.sum(np.asarray(replay.leaves(state)) > 0)
    assert min(steps_in(state.ring)) > FIRST_NEW


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_result_equals_a_replay_that_was_fed_the_same_rows(case):
    """Rows (padding included), cursors and counts are the same, and leaves are above 0 in the same places."""
    result = run(case).result
    replay, state = restored(case, result)
    fed = replay.init()
    for k, size in enumerate(result.ring.size):
        lanes = slice(k * case.new.together, (k + 1) * case.new.together)
        for t in range(size):
            fed = replay.insert(fed, jax.tree.map(lambda x, t=t, lanes=lanes: x[t, lanes], result.ring.rows), k)
    jax.tree.map(np.testing.assert_array_equal, state.ring, fed.ring)
    if case.kinds[1] == PRIORITISED:
        np.testing.assert_array_equal(replay.leaves(state) > 0, replay.leaves(fed) > 0)
        np.testing.assert_array_equal(state.num_transitions, fed.num_transitions)
        np.testing.assert_array_equal(state.num_expiring, fed.num_expiring)


@pytest.mark.parametrize("case", [case for case in CASES if case.kinds[1] == PRIORITISED], ids=str)
def test_transitions_keep_their_priorities_and_others_enter_at_the_greatest(case):
    saved, result, _, _ = run(case)
    old = {}
    if case.kinds[0] == PRIORITISED:
        old = dict(zip(saved.ring.rows.obs.flat, saved.leaves.flat, strict=True))
    numbers = np.where(result.leaves > 0, result.ring.rows.obs, 0)
    expected = [[number and (old.get(number, 0) or saved.max_priority) for number in row] for row in numbers]
    np.testing.assert_array_equal(result.leaves, np.float32(expected))
    is_startable = startable(result.ring, case.n_step, case.frame_stack, forgets_early=True)
    np.testing.assert_array_equal(result.leaves > 0, is_startable)
    assert result.max_priority == saved.max_priority


def test_a_uniform_replay_has_no_leaves():
    for case in CASES:
        assert isinstance(run(case).result.leaves, tuple) == (case.kinds[1] == UNIFORM)


@pytest.mark.parametrize("kind", [UNIFORM, PRIORITISED])
def test_the_newest_rows_are_kept_of_an_episode_that_is_longer_than_the_ring(kind):
    """With stacked frames, no transition starts at the first of these rows, because their frames are gone."""
    case = Case(FUSED, (30,), Layout(12, 2), (kind, kind), 3, 4)
    _, result, num_dropped, pasts = run(case, end_probability=0.0)
    np.testing.assert_array_equal(result.ring.rows.obs, pasts_rows(pasts[0])[18:])
    assert num_dropped == 2 * (30 - 11)
    replay, state = restored(case, result)
    allowed, seen = pasts[0].transitions(), set()
    for i in range(30):
        transition = jax.device_get(replay.sample(state, jax.random.key(i), BETA).transition)
        seen |= assert_allowed(transition, allowed, 4)
    assert seen == set(result.ring.rows.obs[3 : 12 - 3].astype(int).flat)


def pasts_rows(past):
    return np.array([[step.number for step in row] for row in past.oracle.history])


def test_lanes_of_similar_length_share_a_segment():
    """One episode has 20 rows and six have 5. In a single segment, the longest lane would pad all the others."""
    obs = np.arange(1, 2 * 31 + 1, dtype=np.float32).reshape(31, 2)
    outcome = np.zeros((31, 2), np.uint8)
    outcome[20:, 0] = NO_STEP
    outcome[4::5, 1], outcome[3::5, 1] = NO_STEP, TRUNCATED
    zeros = np.zeros((31, 2))
    rows = Row(obs, zeros.astype(np.int32), zeros.astype(np.float32), outcome)
    ring = Ring(rows, np.int32([0]), np.int32([31]), np.uint32([31]))
    saved = SavedReplay(ring, (), np.float32(1))
    result, num_dropped = resharded(saved, 32, 4, 2, window=Window(1, 1), is_prioritised=False)
    np.testing.assert_array_equal(result.ring.size, [21, 10])
    np.testing.assert_array_equal(result.ring.cursor, [21, 10])
    assert num_dropped == 1  # the newest step of the second lane


def test_an_empty_replay_stays_empty():
    replay = make(FLEET, PRIORITISED, 3, 4)
    state = replay.init()
    saved = SavedReplay(state.ring, replay.leaves(state), state.max_priority)
    result, num_dropped = resharded(saved, *WIDE, window=Window(3, 4), is_prioritised=True)
    assert num_dropped == 0
    wide = make(WIDE, PRIORITISED, 3, 4)
    jax.tree.map(np.testing.assert_array_equal, wide.restore(result), wide.init())


def test_lanes_must_divide_over_the_segments():
    with pytest.raises(ValueError, match="got num_lanes=4, num_segments=3; try 6"):
        resharded(run(CASES[0]).saved, 12, 4, 3, window=Window(1, 1), is_prioritised=False)
