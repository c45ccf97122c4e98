"""Compares sequences that are drawn from the replay with those of a slow replay in plain Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from qfleet.config import AgentConfig, ConfigError
from qfleet.core.replay import NO_STEP, Replay, Row, Sample, make_replay, outcome_of, resharded, window_of
from qfleet.core.replay.replay import MIN_PRIORITY, SavedReplay
from qfleet.core.replicas import over_axis
from qfleet.core.types import EnvSpec, Sequences

NUM_ROWS, DISCOUNT, EXPONENT, BETA, BATCH_SIZE = 18, 0.9, 0.7, 0.6, 128
BURN_IN, LENGTH, PERIOD = 2, 3, 3
SMALLEST_P = 1e-4

CASES = [
    # replay, n_step, frame_stack, lanes, burn_in, length, replicas
    ("uniform", 2, 1, 3, BURN_IN, LENGTH, 1),
    ("uniform", 1, 3, 1, 0, 1, 1),
    ("prioritised", 3, 2, 2, BURN_IN, LENGTH, 1),
    ("prioritised", 1, 1, 2, BURN_IN, 1, 1),
    ("prioritised", 2, 2, 4, BURN_IN, LENGTH, 2),
]


def config_of(kind: str, n_step: int, num_lanes: int, burn_in: int, length: int) -> AgentConfig:
    return AgentConfig(
        replay=kind,
        memory="lstm",
        n_step=n_step,
        burn_in=burn_in,
        sequence_length=length,
        sequence_period=min(PERIOD, length),
        discount=DISCOUNT,
        batch_size=BATCH_SIZE,
        priority_exponent=EXPONENT,
        replay_capacity=NUM_ROWS * num_lanes + num_lanes - 1,
    )


def spec_of(frame_stack: int) -> EnvSpec:
    return EnvSpec(
        name="stream",
        observation_shape=(2, 2),
        observation_dtype=np.dtype(np.uint8),
        num_actions=5,
        frame_stack=frame_stack,
    )


def rows_of(stream: list[list[oracle.Step]]) -> Row:
    """Returns the stream as rows, `[rows, lanes, ...]`, whose states carry the numbers of their observations."""
    facts = (oracle.columns(stream, field) for field in ("terminated", "truncated", "final"))
    numbers = oracle.columns(stream, "number")
    return Row(
        obs=oracle.encode(numbers, np.dtype(np.uint8)),
        action=oracle.columns(stream, "action").astype(np.int32),
        reward=oracle.columns(stream, "reward").astype(np.float32),
        outcome=np.asarray(outcome_of(*facts)),
        carry=np.stack([numbers, -numbers], axis=-1).astype(np.float32),
    )


def error_of(number: Any, t: Any) -> Any:
    return 0.05 + (number * 37 % 11) * (t * 13 % 7)


@functools.cache
def recorded(
    kind: str, n_step: int, frame_stack: int, num_lanes: int, burn_in: int, length: int, num_replicas: int
) -> tuple[oracle.OracleSequences, list[list[oracle.Step]], Sample, Any]:
    """Runs through a stream in one scan, with a batch after each row, whose priorities are set.

    Returns the oracle, the stream, the samples `[rows, batch, ...]`, and the leaves after each row.
    """
    config = config_of(kind, n_step, num_lanes, burn_in, length)
    replay = make_replay(spec_of(frame_stack), config, num_lanes, over_axis("data", num_replicas), carry_size=2)
    slow = oracle.OracleSequences(
        NUM_ROWS, num_lanes, n_step, frame_stack, DISCOUNT,
        burn_in=burn_in, length=length, period=config.rows_per_start,
    )  # fmt: skip
    stream = oracle.random_stream(3, 4 * NUM_ROWS, num_lanes)

    def step(state: Any, inputs: Any) -> Any:
        t, row, key = inputs
        state = replay.insert(state, row)
        leaves, sample = replay.leaves(state), replay.sample(state, key, jnp.float32(BETA))
        error = error_of(sample.transition.carry[:, 0], t).astype(jnp.float32)
        state = jax.lax.cond(
            t >= config.rows_after_start, lambda s: replay.set_priorities(s, sample, error), lambda s: s, state
        )
        return state, (sample._replace(slot=(), is_mine=(), insertions=()), leaves)

    def run(inputs: Any) -> Any:
        return jax.lax.scan(step, replay.init(), inputs)[1]

    if num_replicas > 1:
        if num_replicas > jax.device_count():
            pytest.skip(f"needs {num_replicas} devices")
        mesh = jax.make_mesh((num_replicas,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        lanes = jax.P(None, "data")
        specs = ((jax.P(), lanes, jax.P()),), (lanes, jax.P(None, None, "data"))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    num_rows = len(stream)
    inputs = jnp.arange(num_rows), rows_of(stream), jax.random.split(jax.random.key(1), num_rows)
    samples, leaves = jax.device_get(jax.jit(run)(inputs))
    return slow, stream, samples, leaves


def frames(obs: np.ndarray, frame_stack: int) -> np.ndarray:
    return oracle.decode(obs)[..., None] if frame_stack == 1 else oracle.decode(np.moveaxis(obs, -1, -3))


def starts_of(batch: Sequences, num_lanes: int) -> list[tuple[int, int]]:
    return [divmod(int(number) - 1, num_lanes) for number in batch.carry[:, 0]]


def assert_is(batch: Sequences, expected: list[oracle.OracleSequence], frame_stack: int) -> None:
    """Checks all fields of a batch."""

    def column(field: str) -> np.ndarray:
        return np.array([getattr(each, field) for each in expected])

    is_step = column("is_step")
    np.testing.assert_array_equal(batch.carry, np.stack([column("number"), -column("number")], axis=-1))
    np.testing.assert_array_equal(frames(np.asarray(batch.obs), frame_stack), column("frames"))
    np.testing.assert_array_equal(batch.is_first, column("is_first"))
    np.testing.assert_array_equal(batch.is_step, is_step)
    np.testing.assert_array_equal(np.asarray(batch.action)[is_step], column("action")[is_step])
    np.testing.assert_allclose(np.asarray(batch.reward)[is_step], column("reward")[is_step], atol=1e-6)
    np.testing.assert_allclose(np.asarray(batch.discount)[is_step], column("discount")[is_step], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(batch.num_steps)[is_step], column("bootstrap")[is_step])


def chi_square(starts: list[tuple[int, int]], drawable: list[tuple[int, int]], probability: np.ndarray) -> float:
    place = {start: i for i, start in enumerate(drawable)}
    counts = np.bincount([place[start] for start in starts], minlength=len(drawable))
    expected = len(starts) * probability
    return float(np.sum((counts - expected) ** 2 / expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sequence_is_found_in_the_oracle_and_drawn_as_often_as_it_should(case: Any) -> None:
    kind, _, frame_stack, num_lanes, *_ = case
    slow, stream, samples, leaves = recorded(*case)
    slow.history.clear()
    known = oracle.OraclePriorities(slow, EXPONENT, MIN_PRIORITY)
    statistic, freedom, num_crossing = 0.0, 0, 0
    for t, row in enumerate(stream):
        known.insert(row)
        if kind == "prioritised":
            np.testing.assert_allclose(leaves[t].reshape(-1), known.leaves(), rtol=1e-5)
        drawable = slow.drawable(forgets_early=kind == "prioritised")
        if not drawable:
            continue
        batch = jax.tree.map(lambda x, t=t: x[t], samples).transition
        starts = starts_of(batch, num_lanes)
        assert set(starts) <= set(drawable)
        sequences = {start: slow.sequence(*start) for start in drawable}
        assert_is(batch, [sequences[start] for start in starts], frame_stack)
        num_crossing += sum(any(each.is_first) for each in sequences.values())
        priority = np.array([known.of[start] if kind == "prioritised" else 1.0 for start in drawable])
        probability = priority / priority.sum()
        statistic += chi_square(starts, drawable, probability)
        freedom += len(drawable) - 1
        of_start = dict(zip(drawable, probability, strict=True))
        drawn = np.array([of_start[start] for start in starts])
        weight = (len(drawable) * drawn) ** -BETA if kind == "prioritised" else np.ones(len(drawn))
        np.testing.assert_allclose(batch.weight, weight, rtol=1e-4)
        known.set({start: error_of(start[0] * num_lanes + start[1] + 1, t) for start in starts})
    assert stats.chi2.sf(statistic, freedom) > SMALLEST_P
    assert num_crossing > 0 or case[5] == 1


@functools.cache
def late_replay() -> tuple[Replay, Any, Any, Any, list[list[oracle.Step]], Row]:
    config = config_of("prioritised", 2, 2, BURN_IN, LENGTH)
    replay = make_replay(spec_of(1), config, 2, carry_size=2)
    stream = oracle.random_stream(5, 4 * NUM_ROWS, 2)
    return (
        replay,
        jax.jit(replay.insert),
        jax.jit(replay.sample),
        jax.jit(replay.set_priorities),
        stream,
        rows_of(stream),
    )


def test_a_late_priority_never_reaches_a_row_that_was_overwritten() -> None:
    replay, insert, sample_batch, set_priorities, stream, rows = late_replay()
    slow = oracle.OracleSequences(NUM_ROWS, 2, 2, 1, DISCOUNT, burn_in=BURN_IN, length=LENGTH, period=PERIOD)
    known = oracle.OraclePriorities(slow, EXPONENT, MIN_PRIORITY)
    state, num_before = replay.init(), NUM_ROWS + 4
    for t in range(num_before):
        state = insert(state, jax.tree.map(lambda x, t=t: x[t], rows))
        known.insert(stream[t])
    sample = sample_batch(state, jax.random.key(0), jnp.float32(BETA))
    starts = starts_of(jax.device_get(sample.transition), 2)
    errors = {start: 2.0 + 0.1 * start[0] + 0.01 * start[1] for start in starts}
    priority = jnp.array([errors[start] for start in starts], jnp.float32)
    for t in range(num_before, num_before + 2 * NUM_ROWS):
        late = oracle.OraclePriorities(slow, EXPONENT, MIN_PRIORITY)
        late.of = dict(known.of)
        late.set(errors)
        leaves = replay.leaves(set_priorities(state, sample, priority))
        np.testing.assert_allclose(np.ravel(leaves), late.leaves(), rtol=1e-6, err_msg=f"at {t}")
        state = insert(state, jax.tree.map(lambda x, t=t: x[t], rows))
        known.insert(stream[t])


def test_nothing_crosses_a_lane_that_was_lost() -> None:
    """The returns before it are cut short, and the memory starts again after it."""
    replay, insert, sample_batch, _, _, _ = late_replay()
    state = replay.init()
    go = jnp.zeros(2, jnp.uint8)
    for t in range(11):
        if t == 5:
            state = replay.seal(state, jnp.array([True, False]))
        outcome = jnp.where(jnp.array([t == 5, False]), NO_STEP, go)
        number = jnp.full(2, t + 1)
        obs = jnp.asarray(oracle.encode(np.asarray(number), np.dtype(np.uint8)))
        carry = jnp.stack([number, jnp.arange(2)], axis=-1).astype(jnp.float32)
        state = insert(state, Row(obs, go.astype(jnp.int32), jnp.ones(2), outcome, carry))
    batch = jax.device_get(sample_batch(state, jax.random.key(0), jnp.float32(0))).transition
    for i in range(BATCH_SIZE):
        start, lane = int(batch.carry[i, 0]) - 1, int(batch.carry[i, 1])
        for row in range(LENGTH):
            t = start + BURN_IN + row
            num_steps = min(2, 5 - t) if lane == 0 and t < 5 else 2
            assert batch.is_step[i, row] == (lane == 1 or t != 5)
            if batch.is_step[i, row]:
                assert batch.num_steps[i, row] == num_steps
                assert batch.reward[i, row] == pytest.approx(sum(DISCOUNT**k for k in range(num_steps)))
        np.testing.assert_array_equal(
            batch.is_first[i], [lane == 0 and start + r == 6 for r in range(len(batch.is_first[i]))]
        )
    assert batch.is_first.any()


def test_a_replay_divided_anew_keeps_its_states_and_its_sequences() -> None:
    replay, insert, _, _, _, rows = late_replay()
    state = replay.init()
    for t in range(NUM_ROWS + 5):
        state = insert(state, jax.tree.map(lambda x, t=t: x[t], rows))
    saved = jax.device_get(SavedReplay(state.ring, replay.leaves(state), state.max_priority))
    config = config_of("prioritised", 2, 1, BURN_IN, LENGTH)
    moved, _ = resharded(saved, 2 * NUM_ROWS, 1, 1, window=window_of(config, 1), is_prioritised=True)
    held = np.asarray(moved.ring.rows.carry)[: int(moved.ring.size[0]), 0, 0]
    assert (np.asarray(moved.ring.rows.carry)[..., 0] == oracle.decode(np.asarray(moved.ring.rows.obs))).all()
    assert len(held) > NUM_ROWS
    leaves = np.asarray(moved.leaves)[:, 0]
    is_step = np.asarray(moved.ring.rows.outcome)[:, 0] != NO_STEP
    for row in range(2 * NUM_ROWS):
        is_complete = row % PERIOD == 0 and row + config.rows_after_start < len(held)
        has_step = is_step[row + BURN_IN : row + BURN_IN + LENGTH].any()
        assert (leaves[row] > 0) == (is_complete and has_step)


@pytest.mark.parametrize(
    ("kind", "settings", "fewest"), [("uniform", {}, 2 * 12), ("prioritised", {"n_step": 3}, 2 * 15)]
)
def test_a_capacity_below_one_sequence_is_refused_with_one_that_fits(kind: Any, settings: Any, fewest: int) -> None:
    options: dict[str, Any] = {"burn_in": BURN_IN, "sequence_length": LENGTH, "sequence_period": PERIOD, "n_step": 2}
    options = {"memory": "gru", "replay": kind, **options, **settings}
    make_replay(spec_of(2), AgentConfig(**options, replay_capacity=fewest), 2)
    with pytest.raises(ConfigError, match=rf"least burn_in \+ .* and sequence_period=3; try {fewest}$"):
        make_replay(spec_of(2), AgentConfig(**options, replay_capacity=fewest - 1), 2)
