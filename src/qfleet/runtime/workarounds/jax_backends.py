"""JAX doesn't say whether it has started, without starting by the question. Seen in JAX 0.10.2 and 0.11.2."""


def has_started() -> bool:
    """Returns whether this process, or the one that it was forked from, has used JAX's devices."""
    from jax._src import xla_bridge

    return bool(xla_bridge._backends)  # its own function takes a lock, which a fork may have left locked for ever
