"""Times peers whose whole training is one compiled program; runs in the peers' environment."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def print_speed(train: Callable[[jax.Array], Any], env_steps: int, num_repeats: int = 3) -> None:
    """Prints the median environment steps/s of `train(key)`, which takes `env_steps`, without its compilation."""
    compiled = jax.jit(train).lower(jax.random.PRNGKey(0)).compile()
    jax.block_until_ready(compiled(jax.random.PRNGKey(0)))
    speeds = []
    for repeat in range(num_repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(jax.random.PRNGKey(repeat)))
        speeds.append(env_steps / (time.perf_counter() - started))
    print(json.dumps({"env_steps_per_second": statistics.median(speeds)}))
