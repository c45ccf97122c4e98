"""What equal processes agree on while they run one program together; with one process there is nobody to ask.

All of them call each of these at the same place. What a clock says, or a signal, differs between processes, and one
that decided by its own would run another program than the rest, which would wait for it for ever.
"""

import numpy as np


def process_index() -> int:
    """Returns which of the processes this is."""
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Returns whether this process is the one that writes what only one must."""
    return process_index() == 0


def gather(values: np.ndarray) -> np.ndarray:
    """Returns every process's `values`, `[processes, ...]`."""
    import jax

    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))


def firsts(number: float) -> float:
    """Returns the first process's number."""
    return float(gather(np.float64(number).reshape(1))[0, 0])


def any_of(flag: bool) -> bool:
    """Returns whether any process's flag is set."""
    return bool(gather(np.array([flag])).any())
