"""The replay on the default device, a GPU where there is one, against the same steps one by one on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.config import AgentConfig
from qfleet.core.replay import Row, make_replay, outcome_of
from qfleet.core.types import EnvSpec

NUM_LANES, NUM_ROWS, NUM_INSERTED = 4, 16, 23
FIRST_DRAW, DRAW_PERIOD, BATCH_SIZE = 6, 4, 32
BETA = 0.6


def make(kind):
    spec = EnvSpec(
        name="stream", observation_shape=(6, 6), observation_dtype=np.dtype(np.uint8), num_actions=5, frame_stack=4
    )
    config = AgentConfig(
        replay=kind, n_step=3, batch_size=BATCH_SIZE, priority_exponent=1.0, replay_capacity=NUM_ROWS * NUM_LANES
    )
    return make_replay(spec, config, NUM_LANES)


def rows():
    rng = np.random.default_rng(0)
    final = np.zeros(NUM_LANES, bool)
    for _ in range(NUM_INSERTED):
        terminated, truncated = (rng.random((2, NUM_LANES)) < 0.1) & ~final
        yield Row(
            obs=rng.integers(256, size=(NUM_LANES, 6, 6), dtype=np.uint8),
            action=rng.integers(5, size=NUM_LANES).astype(np.int32),
            reward=rng.normal(size=NUM_LANES).astype(np.float32),
            outcome=np.asarray(outcome_of(terminated, truncated, final)),
        )
        final = terminated | truncated


def used(kind, jit):
    """What a replay has become and what was drawn from it, after rows, draws and new priorities in turn.

    Errors are whole numbers from 32 on, which the least priority that is added to them doesn't change: sums of
    priorities are exact in any order, so that the same transitions must be drawn on any device.
    """
    replay = make(kind)
    insert, sample, set_priorities = jit(replay.insert), jit(replay.sample), jit(replay.set_priorities)
    state, samples = replay.init(), []
    for i, row in enumerate(rows()):
        state = insert(state, row)
        if i >= FIRST_DRAW and (i - FIRST_DRAW) % DRAW_PERIOD == 0:  # each is many steps, one by one
            samples.append(sample(state, jax.random.key(i), jnp.float32(BETA)))
            td_error = jnp.float32(32 + np.random.default_rng(i).integers(64, size=BATCH_SIZE))
            state = set_priorities(state, samples[-1], td_error)
    return jax.device_get((state, samples))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "prioritised"])
def test_a_compiled_replay_on_any_device_does_what_its_steps_do_one_by_one_on_the_cpu(kind):
    state, samples = used(kind, jax.jit)
    with jax.default_device(jax.devices("cpu")[0]), jax.disable_jit():
        expected_state, expected_samples = used(kind, lambda function: function)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    for found, expected in zip(samples, expected_samples, strict=True):
        np.testing.assert_array_equal(found.slot, expected.slot)
        for field, value in expected.transition._asdict().items():
            np.testing.assert_allclose(getattr(found.transition, field), value, rtol=1e-5, atol=1e-6, err_msg=field)
    if kind == "prioritised":
        assert len({float(weight) for sample in samples for weight in sample.transition.weight}) > 10
