"""Random keys by number."""

import jax
from jax import Array


def key_of(seed: Array | int, *numbers: Array | int) -> Array:
    """Returns the key that a seed and some numbers name, each below 2**32: another one for any others."""
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
