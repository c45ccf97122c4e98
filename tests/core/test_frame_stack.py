"""The view of an agent."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from qfleet.core.frame_stack import init_view, push_frame, stack_to_storage_layout


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("frame_stack", [1, 2, 4])
def test_the_agent_acts_on_the_stacks_that_the_replay_rebuilds(frame_stack, dtype):
    """Also at the first steps of an episode, and at a final observation."""
    num_rows, num_lanes = 40, 3
    stream = oracle.random_stream(0, num_rows, num_lanes)
    known = oracle.OracleReplay(num_rows, num_lanes, 1, frame_stack, 1.0)
    frames = jnp.asarray(oracle.encode(oracle.columns(stream, "number"), dtype))
    final = oracle.columns(stream, "final")
    push = jax.jit(push_frame, static_argnums=3)
    view = init_view(frames[0], frame_stack)
    for t in range(num_rows):
        if t > 0:
            view = push(view, frames[t], final[t - 1], frame_stack)
        known.insert(stream[t])
        assert view.dtype == dtype
        seen = view[..., None] if frame_stack == 1 else view
        numbers = oracle.decode(np.moveaxis(np.asarray(seen), -1, 1))
        np.testing.assert_array_equal(numbers, [known.frames(t, lane) for lane in range(num_lanes)])


def test_one_frame_adds_no_axis():
    obs = jnp.arange(6.0).reshape(2, 3)
    assert init_view(obs, 1) is obs
    assert push_frame(obs, obs + 1, jnp.array([True, False]), 1).shape == (2, 3)


def test_scalar_observations_stack_too():
    view = push_frame(init_view(jnp.array([1.0, 2.0]), 3), jnp.array([3.0, 4.0]), jnp.array([False, True]), 3)
    np.testing.assert_array_equal(view, [[0, 1, 3], [0, 0, 4]])


@pytest.mark.parametrize("frame_stack", [1, 3])
def test_a_stack_stored_is_a_stack_of_stored_frames(frame_stack):
    frames = jnp.arange(3 * 2 * 4.0).reshape(3, 2, 4)

    def store(obs):
        return jnp.swapaxes(obs.reshape(*obs.shape[:-1], 2, 2), -1, -2)

    raw, stored = init_view(frames[0], frame_stack), init_view(store(frames[0]), frame_stack)
    for frame in frames[1:]:
        raw = push_frame(raw, frame, jnp.zeros(2, bool), frame_stack)
        stored = push_frame(stored, store(frame), jnp.zeros(2, bool), frame_stack)
    np.testing.assert_array_equal(stack_to_storage_layout(store, raw, frame_stack), stored)
