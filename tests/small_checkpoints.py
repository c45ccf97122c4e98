"""Small checkpoints, and a state of every kind that they can hold."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qfleet.runtime.checkpoints import Checkpoints


class State(NamedTuple):
    params: dict[str, Any]
    optimiser: Any
    key: jax.Array
    env_steps: np.ndarray
    nothing: Any = None
    empty: tuple[()] = ()


def make_state(seed: int = 0, width: int = 3) -> State:
    key = jax.random.key(seed)
    params: dict[str, Any] = {
        "dense_0": {"kernel": jax.random.normal(key, (4, width)), "bias": jnp.arange(width, dtype=jnp.bfloat16)},
        "mlp/~/linear": {"w": jax.random.randint(key, (5,), 0, 255).astype(jnp.uint8)},
        "layers": [jnp.float32(1.5), (jnp.array([True, False]),)],
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params["dense_0"]["kernel"])
    return State(params, optimiser, jax.random.split(key, 2), np.array(2**40 + seed))


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)  # type: ignore[operator]
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_some(directory: Path, *env_steps: int, keep: int = 10) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for steps in env_steps:
            state = {"learner": make_state(steps), "replay": {"obs": jnp.full((1000, 4), steps)}}
            checkpoints.save(steps, state, {"best": steps / 2})
