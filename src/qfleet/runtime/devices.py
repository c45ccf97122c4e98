"""How XLA uses the cores of a CPU. It decides once, when JAX is first used, so these must come before."""

import os

import jax

SMALL = 50_000
"""Parameters up to which one thread is faster than several: on two cores a learner step of 5,000 parameters takes
80 us with one thread and 110 us with two, which spend the difference handing tiny operations to each other."""


def limit_cpu_threads(num_parameters: int) -> None:
    """Leaves XLA one thread per CPU device if the network is small, unless the user has set `PJRT_NPROC`."""
    if num_parameters <= SMALL:
        os.environ.setdefault("PJRT_NPROC", "1")


def split_cpu(num_seeds: int) -> None:
    """Makes one CPU device per core, as far as independent learners divide over them."""
    try:
        jax.config.update("jax_num_cpu_devices", num_shards(num_seeds, os.cpu_count() or 1))
    except RuntimeError:
        return  # JAX is in use already, in a notebook say: its devices stay as they are, and serve as well


def num_shards(num_seeds: int, num_devices: int) -> int:
    """Returns the most devices, up to `num_devices`, over which the learners divide evenly."""
    return max(n for n in range(1, min(num_seeds, num_devices) + 1) if num_seeds % n == 0)
