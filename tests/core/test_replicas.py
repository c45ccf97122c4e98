"""Replicas exchange the same, bit for bit, array by array and in few messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.core.replicas import over_axis

SIZE, SHARE = 2, 3
STYLES = pytest.mark.parametrize(
    "style",
    [{}, {"has_slow_messages": True}, {"has_slow_messages": True, "max_gather_bytes": 2**18}],
    ids=["array by array", "few messages", "few messages, gathered"],
)


def in_each(function, *arguments):
    """Returns the results of all replicas, `[replicas, ...]`, for arguments `[replicas, ...]`."""
    return jax.device_get(jax.vmap(function, axis_name="data")(*arguments))


@STYLES
def test_a_batch_is_dealt_in_order_whatever_its_dtypes_and_all_get_what_all_are_to_know(style):
    rng, batch = np.random.default_rng(0), SIZE * SHARE
    whole = {
        "obs": rng.integers(256, size=(batch, 5), dtype=np.uint8),
        "flag": rng.uniform(size=batch) < 0.5,
        "action": rng.integers(-9, 9, size=batch, dtype=np.int32),
        "reward": np.float32([np.nan, -0.0, np.inf, 1e-45, 2.5, -1]),
    }
    owner = rng.integers(SIZE, size=batch)
    is_mine = owner == np.arange(SIZE)[:, None]
    # What a replica has in the place of another's element is arbitrary.
    held = jax.tree.map(lambda x: np.stack([np.where(_like(mine, x), x, x[::-1]) for mine in is_mine]), whole)
    replicas = over_axis("data", SIZE, **style)
    shares, known = in_each(lambda tree, mine: replicas.deal(tree, mine, tree["action"]), held, is_mine)
    for name, found in shares.items():
        assert found.dtype == whole[name].dtype
        assert found.reshape(whole[name].shape).tobytes() == whole[name].tobytes(), name
    np.testing.assert_array_equal(known, np.stack([whole["action"]] * SIZE))


def _like(mine, x):
    return mine.reshape(-1, *(1,) * (x.ndim - 1))


@STYLES
def test_gradients_are_averaged_and_priorities_gathered(style):
    rng = np.random.default_rng(1)
    grads = {"w": rng.normal(size=(SIZE, 4, 2)).astype(np.float32), "b": rng.normal(size=(SIZE, 2)).astype(np.float32)}
    priority = rng.normal(size=(SIZE, SHARE)).astype(np.float32)
    replicas = over_axis("data", SIZE, **style)
    mean, gathered = in_each(replicas.mean_and_gather, grads, priority)
    for name, found in mean.items():
        np.testing.assert_array_equal(found, np.stack([(grads[name][0] + grads[name][1]) / np.float32(2)] * SIZE))
    np.testing.assert_array_equal(gathered, np.stack([priority.reshape(-1)] * SIZE))
    (alone,) = jax.tree.leaves(in_each(replicas.mean, {"b": grads["b"]}))
    np.testing.assert_array_equal(alone, mean["b"])


def test_the_sum_of_nothing_takes_no_message():
    replicas = over_axis("data", SIZE, has_slow_messages=True)
    assert "psum" not in str(jax.make_jaxpr(lambda x: replicas.sum(()), axis_env=[("data", SIZE)])(jnp.float32(0)))
