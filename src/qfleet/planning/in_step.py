"""The speed of runs whose processes take every step together: fused, overlapped, all-reduce."""

import math
from typing import NamedTuple

import numpy as np

from qfleet.config import AgentConfig
from qfleet.planning.costs import Cost, Costs
from qfleet.topologies.schedule import learner_steps, make_plan, rows_per_iteration

BESIDE_UPDATES = 4
"""Learner steps in the part named `environment beside learning`."""

_NUM_ITERATIONS = 64
"""Iterations over which the learner steps are averaged."""


class Iteration(NamedTuple):
    """An iteration of a run on average, once it learns."""

    seconds: float
    env_steps: int
    learner_steps: float
    part_seconds: dict[str, float]
    """Seconds that each part adds. With parts that overlap, it is what the iteration waits for."""


def iteration_of(
    agent: AgentConfig, num_lanes: int, costs: Costs, *, lock_step: bool = False, learns: bool = True
) -> Iteration:
    """Returns an iteration of a run.

    Args:
      agent: the agent's config.
      num_lanes: number of lanes, over all processes.
      costs: of the parts.
      lock_step: whether environments wait while the learner learns.
      learns: whether the warm-up is over.
    """
    num_rows = rows_per_iteration(agent)
    plan = make_plan(agent, num_lanes, _NUM_ITERATIONS, 10 * (agent.warmup_env_steps + num_lanes * 1000), 0)
    num_steps = learner_steps(agent, plan, _NUM_ITERATIONS) / _NUM_ITERATIONS if learns else 0.0
    env_steps = num_rows * num_lanes
    if "row" in costs:
        parts = {"acting and storing": costs["row"].times(num_rows), "learning": costs["learn"].times(num_steps)}
        return _one_after_the_other(parts, env_steps, num_steps)
    parts = {
        "inference": costs["act"].times(num_rows),
        "environment": costs["environment"].times(num_rows),
        "random numbers": costs["draw"],
        "storing": costs["insert"].times(num_rows),
        "learning": costs["learn"].times(num_steps),
    }
    if agent.replay == "none" or lock_step:
        return _one_after_the_other(parts, env_steps, num_steps)
    updates = plan.num_updates.ravel() if learns else np.zeros(1, int)
    numbers, counts = np.unique(updates, return_counts=True)
    waiting = 0.0
    for number, share in zip(numbers.tolist(), (counts / len(updates)).tolist(), strict=True):
        learning = costs["insert"].seconds + number * costs["learn"].seconds
        hidden = overlap(costs) * min(learning, costs["environment"].seconds)
        waiting += share * num_rows * (learning - hidden)
    seconds = {
        "inference": parts["inference"].seconds,
        "random numbers": costs["draw"].seconds,
        "environment": parts["environment"].seconds,
        "waiting for the learner": waiting,
    }
    return Iteration(sum(seconds.values()), env_steps, num_steps, seconds)


def overlap(costs: Costs) -> float:
    """Returns the share of the shorter of two parts that the longer one hides, as measured for a step and learning."""
    learning = costs["insert"].seconds + BESIDE_UPDATES * costs["learn"].seconds
    environment = costs["environment"].seconds
    saved = learning + environment - costs["environment beside learning"].seconds
    return min(1.0, max(0.0, saved / min(learning, environment)))


def _one_after_the_other(parts: dict[str, Cost], env_steps: int, num_steps: float) -> Iteration:
    seconds = {name: cost.seconds for name, cost in parts.items()}
    return Iteration(sum(seconds.values()), env_steps, num_steps, seconds)


def with_messages(
    costs: Costs, num_processes: int, num_bytes: int, latency_seconds: float, bytes_per_second: float
) -> Costs:
    """Returns the costs of processes on different nodes, whose every learner step adds up so many bytes over all."""
    if num_processes == 1:
        return costs
    exchange = all_reduce(num_processes, num_bytes, latency_seconds, bytes_per_second)
    return {**costs, "learn": costs["learn"].plus(exchange)}


def all_reduce(number: int, num_bytes: int, latency_seconds: float, bytes_per_second: float) -> Cost:
    """Returns the cost of adding up so many bytes over a number of processes or devices.

    An all-reduce in a ring moves twice the bytes past each, but for the share that it has itself. It takes at least two
    messages for each doubling of their number.
    """
    moved = 2 * num_bytes * (number - 1) / number
    seconds = moved / bytes_per_second + 2 * math.ceil(math.log2(number)) * latency_seconds
    return Cost(0.0, wait_seconds=seconds)
