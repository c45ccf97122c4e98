"""The speed of a run on Ray, from a simulation of its beginning."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from qfleet.config import ActorLearnerConfig, ParameterServerConfig, RayTopologyConfig, RunFailed, TrainConfig
from qfleet.planning.cluster import Cluster, this_machine
from qfleet.planning.costs import Cost, Costs
from qfleet.planning.fleet import Fleet, FleetModel
from qfleet.planning.prediction import Speed

_ENDLESS = 10**12
"""Environment steps of the simulated run, so that it doesn't end while it is measured."""

_FULL = 0.9
"""Share of the time for which something is busy from which on it counts as what limits the run."""


_MOST_CHUNKS = 4_000
"""Chunks after which a simulation counts as settled, and chunks over which its speed is taken, at most."""


_LOSSES = 5
"""Processes that must be lost while the speed is taken, if processes are lost at all."""


class Budget(NamedTuple):
    """How much is simulated at most: events, and the CPU time that they take."""

    events: int = 400_000
    cpu_seconds: float = 15.0


class _Moment(NamedTuple):
    """Counts of the simulation at one moment."""

    seconds: float
    env_steps: int
    learner_steps: int
    busy: dict[str, float]
    moved_bytes: int
    wire_bytes: int


def endless(config: TrainConfig) -> TrainConfig:
    """Returns a run like this one that doesn't end."""
    return dataclasses.replace(config.with_schedule_lengths(), env_steps=_ENDLESS)


def decisions(model: FleetModel[Any], costs: Costs) -> Callable[[], float]:
    """Returns a function that has a run's machine take its next turn, and returns the CPU seconds of its decisions.

    Args:
      model: of the run, in a simulation of which the machine decides.
      costs: of its parts, as far as they are known.
    """
    guessed = {"call": Cost(3e-5), "turn": Cost(5e-5), **costs}
    fleet = Fleet(model, guessed, this_machine())
    fleet.run_until(lambda: model.machine.learner_steps > 0, 20_000)

    def next_turn() -> float:
        seconds, number = fleet.decision_seconds, fleet.num_turns
        fleet.run_until(lambda: fleet.num_turns > number, 10_000)
        return fleet.decision_seconds - seconds

    return next_turn


def simulate(
    model: FleetModel[Any],
    costs: Costs,
    cluster: Cluster,
    env_steps_per_chunk: int,
    num_acting: int,
    budget: Budget | None = None,
) -> Speed:
    """Returns the speed of a run.

    Args:
      model: of its topology, in a run that doesn't end.
      costs: of its parts.
      cluster: where its processes are.
      env_steps_per_chunk: environment steps of one chunk of a process that acts.
      num_acting: number of these processes.
      budget: how much to simulate at most.
    """
    budget, env_steps_per_wave = budget or Budget(), env_steps_per_chunk * num_acting
    fleet, machine = Fleet(model, costs, cluster), model.machine
    limit = _within(budget, fleet)
    fleet.run_until(lambda: machine.learner_steps > 0 or limit(), budget.events)
    warm = _moment(fleet)
    settled = machine.env_steps + min(5 * env_steps_per_wave, _MOST_CHUNKS * env_steps_per_chunk)
    fleet.run_until(lambda: machine.env_steps >= settled or limit(0.5), budget.events)
    first = _moment(fleet)
    window = min(30 * env_steps_per_wave, _MOST_CHUNKS * env_steps_per_chunk)
    goal, steps = machine.env_steps + window, machine.learner_steps + 200
    num_lost = fleet.num_lost + (_LOSSES if cluster.lost_per_process_hour else 0)

    def is_over() -> bool:
        has_run = machine.env_steps >= goal and machine.learner_steps >= steps
        return (has_run and fleet.num_lost >= num_lost) or limit()

    fleet.run_until(is_over, budget.events)
    if machine.learner_steps == first.learner_steps or machine.env_steps == first.env_steps:
        raise RunFailed(
            f"a simulation must come to both environment and learner steps, got {machine.env_steps} and "
            f"{machine.learner_steps} in {fleet.clock.now:.0f} simulated seconds: {_busiest(fleet)} falls behind; give "
            f"fewer processes, or a smaller warmup_env_steps"
        )
    return _speed(fleet, warm, first, _moment(fleet))


def _busiest(fleet: Fleet) -> str:
    """Returns who has been busy for most of the time."""
    busy = {process.id.name: process.busy_seconds for process in fleet.processes.values()}
    return max({**busy, "director": fleet.director_busy_seconds}.items(), key=lambda each: each[1])[0]


def _within(budget: Budget, fleet: Fleet) -> Callable[..., bool]:
    """Returns a function that tells whether a share of the budget is used up."""
    began = time.thread_time()

    def is_used_up(share: float = 1.0) -> bool:
        has_run_long = fleet.clock.num_events % 256 == 0 and time.thread_time() - began > share * budget.cpu_seconds
        return fleet.clock.num_events > share * budget.events or has_run_long

    return is_used_up


def _moment(fleet: Fleet) -> _Moment:
    busy: dict[str, float] = {"director": fleet.director_busy_seconds}
    for process in fleet.processes.values():
        busy[process.id.role] = busy.get(process.id.role, 0.0) + process.busy_seconds
    for number, (cores, link) in enumerate(zip(fleet.cores, fleet.links, strict=True)):
        busy[f"cores of node {number}"] = cores.busy_seconds
        busy[f"link of node {number}"] = link.busy_seconds
    machine = fleet.model.machine
    return _Moment(fleet.clock.now, machine.env_steps, machine.learner_steps, busy, fleet.moved_bytes, fleet.wire_bytes)


def _speed(fleet: Fleet, warm: _Moment, first: _Moment, last: _Moment) -> Speed:
    seconds = last.seconds - first.seconds
    env_rate = (last.env_steps - first.env_steps) / seconds if seconds else math.nan
    learner_rate = (last.learner_steps - first.learner_steps) / seconds if seconds else math.nan
    config = fleet.model.machine.config
    if isinstance(config.topology, ActorLearnerConfig | ParameterServerConfig):
        # While the actors are still running ahead of the learner, the learner's speed is what counts in the long run.
        env_rate = min(env_rate, learner_rate * config.agent.env_steps_per_learner_step)
    busy = _shares(fleet, first, last)
    env_steps = max(1, last.env_steps - first.env_steps)
    limit, waits = _limit(busy, config)
    return Speed(
        env_steps_per_second=env_rate,
        learner_steps_per_second=learner_rate,
        warmup_seconds=warm.seconds,
        warmup_env_steps=warm.env_steps,
        busy=busy,
        limit=limit,
        waits=waits,
        moved_bytes_per_env_step=(last.moved_bytes - first.moved_bytes) / env_steps,
        wire_bytes_per_env_step=(last.wire_bytes - first.wire_bytes) / env_steps,
        num_lost=fleet.num_lost,
        simulated_seconds=last.seconds,
    )


def _shares(fleet: Fleet, first: _Moment, last: _Moment) -> dict[str, float]:
    """Returns the share of the time for which each kind of process was busy, and the busiest cores and link."""
    seconds = max(1e-9, last.seconds - first.seconds)
    counts: dict[str, int] = {}
    for process in fleet.processes:
        counts[process.role] = counts.get(process.role, 0) + 1
    shares = {
        name: (last.busy[name] - first.busy[name]) / seconds / counts.get(name, 1)
        for name in last.busy
        if " of node " not in name
    }
    groups = [group for _, group in fleet.cluster.nodes()]
    for kind in ("cores", "link"):
        of_nodes = [
            (last.busy[f"{kind} of node {i}"] - first.busy[f"{kind} of node {i}"])
            / seconds
            / (group.cores if kind == "cores" else 1)
            for i, group in enumerate(groups)
        ]
        shares["busiest cores" if kind == "cores" else "busiest link"] = max(of_nodes)
    return {name: min(1.0, share) for name, share in shares.items()}


_ONE_BY_ONE = ("director", "learner", "server shard", "replay shard", "busiest link")
"""What can limit a run although its cores have time left."""


def _limit(busy: dict[str, float], config: TrainConfig) -> tuple[str, tuple[str, ...]]:
    """Returns what limits a run, and who waits for whom."""
    who_acts = next(role for role in ("actor", "worker", "peer") if role in busy)
    alone = max((name for name in _ONE_BY_ONE if name in busy), key=lambda name: busy[name])
    if busy["busiest cores"] >= _FULL:
        limit = "cores: those of the busiest node have no time left"
    elif busy[alone] >= _FULL:
        limit = f"{alone}: it is busy all the time"
    elif busy[who_acts] >= _FULL:
        limit = f"{who_acts}s: they are busy all the time"
    else:
        limit = "the round trips between processes: nothing is busy all the time"
    waits = []
    topology = config.topology_as(RayTopologyConfig)
    if topology.name != "gossip":
        other = "the learner, which holds the replay ratio" if "learner" in busy else "the server or for requests"
        if busy[who_acts] < _FULL:
            waits.append(f"{who_acts}s wait {1 - busy[who_acts]:.0%} of the time for {other}")
        if busy.get("learner", 1.0) < _FULL:
            waits.append(f"the learner waits {1 - busy['learner']:.0%} of the time for environment steps")
    return limit, tuple(waits)
