"""Times one part again and again, until enough is known of it."""

import dataclasses
import time
from collections.abc import Callable

import jax

from qfleet.core.types import Params
from qfleet.planning.costs import Cost, cost_of
from qfleet.runtime import peers
from qfleet.topologies.mesh import leaves_of

PART_SECONDS = 0.4
"""Time for which one part is measured."""

_MOST_CALLS = 200
_FEWEST_CALLS = 5


def timed(call: Callable[[], object], seconds: float = PART_SECONDS) -> Cost:
    """Returns the cost of a call, which must return when its work is done. Equal processes call it the same times."""
    call()
    started = time.perf_counter()
    call()
    once = max(1e-6, time.perf_counter() - started)
    num_calls = round(peers.firsts(min(_MOST_CALLS, max(_FEWEST_CALLS, seconds / once))))
    work, wall = [], []
    for _ in range(num_calls):
        cpu, started = time.process_time(), time.perf_counter()
        call()
        wall.append(time.perf_counter() - started)
        work.append(time.process_time() - cpu)
    return cost_of(work, wall, is_coupled=jax.process_count() > 1)


def repetitions(call: Callable[[int], object], call_seconds: float = 0.02) -> int:
    """Returns how often a program must repeat its work so that one call takes about so long, and starting it little.

    Args:
      call: calls the program with a number of repetitions.
      call_seconds: time that a call should take.
    """
    call(1)
    number = 1
    while number < 1 << 16:
        started = time.perf_counter()
        call(number)
        seconds = peers.firsts(time.perf_counter() - started)
        if seconds >= call_seconds / 2:
            return max(1, round(number * call_seconds / seconds))
        number = min(8 * number, max(2 * number, round(number * call_seconds / max(seconds, 1e-6))))
    return number


def time_snapshots(params: Params) -> Cost:
    """Returns the cost of a copy of parameters on the host."""
    num_bytes = sum(leaf.nbytes for leaf in leaves_of(params))
    return dataclasses.replace(timed(lambda: leaves_of(params), 0.1), num_bytes=num_bytes)
