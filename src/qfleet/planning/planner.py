"""Makes the plan of a run: measures its parts or reads what they cost, and predicts from that."""

import dataclasses
import functools
from typing import Any

from qfleet.config import (
    ActorLearnerConfig,
    AllReduceConfig,
    ConfigError,
    GossipConfig,
    OverlappedConfig,
    ParameterServerConfig,
    RayTopologyConfig,
    RunFailed,
    TrainConfig,
)
from qfleet.config.lane_options import num_cores
from qfleet.envs.registry import make_env
from qfleet.planning.actor_learner import ActorLearnerModel
from qfleet.planning.advice import advice_for
from qfleet.planning.cluster import Cluster, check_factors, this_machine
from qfleet.planning.costs import COLD, Cost, Costs, key_of, read_costs, write_costs
from qfleet.planning.fleet import GIGABIT, FleetModel
from qfleet.planning.gossip import GossipModel
from qfleet.planning.in_step import iteration_of, with_messages
from qfleet.planning.measuring.parts import measure_parts
from qfleet.planning.one_more_device import (
    SHARE,
    OneMoreDevice,
    costs_of_shares,
    with_costs_of_shares,
    with_one_more_device,
)
from qfleet.planning.parameter_server import ParameterServerModel
from qfleet.planning.prediction import Plan, Speed, WhatIf
from qfleet.planning.simulated_run import Budget, endless, simulate
from qfleet.runtime.activity import announce
from qfleet.runtime.child_process import visible_gpus
from qfleet.topologies.footprint import Footprint
from qfleet.training.assembly import footprint


def make_plan(config: TrainConfig, cluster: Cluster | None = None, *, measure: bool = False) -> Plan:
    """Returns what is predicted of a run, which is not started.

    Args:
      config: of the run.
      cluster: the nodes that it would run on; None for this machine.
      measure: measure its parts even if their costs are on the disk.

    Raises:
      ConfigError: if the run isn't possible, or has more than one seed.
      RunFailed: if a part can't be measured.
    """
    if config.num_seeds > 1:
        raise ConfigError(f"a plan must be of one seed, got num_seeds={config.num_seeds}; leave --num-seeds out")
    config = config.with_schedule_lengths()
    announce("computing shapes")
    kept = footprint(config)
    platform, kind = _learning_devices(config, kept)
    costs, were_measured = _costs(_measurable(config, cluster), kind, measure=measure)
    if more := with_one_more_device(config, platform):
        of_share, share_was_measured = _costs(more.share, kind, measure=measure)
        were_measured |= share_was_measured
        batches = _batches_per_learn(more.config), _batches_per_learn(more.share)
        costs = {**costs, **costs_of_shares(more, costs, of_share, kept, batches)}
    cluster = cluster or this_machine()
    check_factors(cluster.factors, [name for name in costs if not name.endswith((COLD, SHARE))])
    costs = {name: cost.times(cluster.factors.get(_without_case(name), 1.0)) for name, cost in costs.items()}
    announce("simulating")
    speed = _predict(config, costs, cluster, Budget())
    return Plan(
        env=config.env,
        preset=config.preset,
        topology=config.topology.name,
        place=_place(config, cluster),
        env_steps=config.env_steps,
        seconds=speed.seconds_until(config.env_steps),
        speed=speed,
        process_memory_bytes=_memory(costs),
        num_processes=_num_processes(config),
        device_memory_bytes={part.name: part.bytes_per_device for part in kept.parts},
        what_if=tuple(_what_ifs(config, costs, cluster, speed, more)),
        advice=advice_for(config, _num_params(kept)),
        costs=costs,
        were_measured=were_measured,
    )


def _learning_devices(config: TrainConfig, kept: Footprint) -> tuple[str, str]:
    """Returns platform and kind of the devices that learn. A process that directs others sees only CPUs itself."""
    if isinstance(config.topology, RayTopologyConfig) and visible_gpus():
        return "gpu", "gpu"
    return kept.devices[0].platform, kept.devices[0].device_kind


def _without_case(name: str) -> str:
    """Returns the name of a part without the case in which it costs so much."""
    return name.removesuffix(SHARE).removesuffix(COLD)


def _costs(config: TrainConfig, devices: str, *, measure: bool) -> tuple[Costs, bool]:
    """Returns the costs of a run's parts, and whether they were measured now."""
    key = key_of(config, devices)
    costs = None if measure else read_costs(key)
    if costs is not None:
        return costs, False
    announce("measuring the parts of the run")
    costs = measure_parts(config)
    write_costs(key, costs)
    return costs, True


def _measurable(config: TrainConfig, cluster: Cluster | None) -> TrainConfig:
    """Returns the run whose parts are measured: on other nodes, one of equal processes has its share of everything."""
    topology = config.topology
    if cluster is None or not isinstance(topology, AllReduceConfig):
        return config
    number = topology.num_processes
    if topology.num_envs % number or config.agent.batch_size % number:
        raise ConfigError(
            f"num_envs and batch_size must divide over the processes, got num_envs={topology.num_envs}, "
            f"batch_size={config.agent.batch_size} and num_processes={number}; give multiples"
        )
    agent = dataclasses.replace(
        config.agent,
        batch_size=config.agent.batch_size // number,
        replay_capacity=max(1, config.agent.replay_capacity // number),
    )
    own = dataclasses.replace(topology, num_processes=1, num_envs=topology.num_envs // number)
    return dataclasses.replace(config, agent=agent, topology=own)


def _predict(config: TrainConfig, costs: Costs, cluster: Cluster, budget: Budget) -> Speed:
    is_on_ray = isinstance(config.topology, RayTopologyConfig)
    return (_speed_on_ray if is_on_ray else _speed_in_step)(config, costs, cluster, budget)


def _speed_on_ray(config: TrainConfig, costs: Costs, cluster: Cluster, budget: Budget) -> Speed:
    config = endless(config)
    pool, model = config.topology_as(RayTopologyConfig).actor_pool, _model(config, costs)
    chunk = model.env_steps_per_chunk if isinstance(model, GossipModel) else pool.lanes_per_actor * pool.rows_per_chunk
    return simulate(model, costs, cluster, chunk, pool.num_actors, budget)


def _model(config: TrainConfig, costs: Costs) -> FleetModel[Any]:
    match config.topology:
        case ActorLearnerConfig():
            return ActorLearnerModel(config, costs, _batches_per_learn(config))
        case ParameterServerConfig():
            return ParameterServerModel(config, costs)
    return GossipModel(config, costs)


def _batches_per_learn(config: TrainConfig) -> int:
    """Returns the number of batches in the part that is named `learn`."""
    if not isinstance(config.topology, ActorLearnerConfig):
        return 1
    from qfleet.topologies.actor_learner.learner import batches_per_round

    return batches_per_round(config, make_env(config.env, **config.env_options).spec)


def _speed_in_step(config: TrainConfig, costs: Costs, cluster: Cluster, _: Budget) -> Speed:
    """Returns the speed of a run whose processes take every step together."""
    topology, agent = config.topology, config.agent
    speed, num_processes, bytes_per_learner_step = cluster.groups[0].speed, 1, 0.0
    lock_step = isinstance(topology, OverlappedConfig) and (topology.lock_step or topology.profile)
    if isinstance(topology, AllReduceConfig):
        num_processes, lock_step = topology.num_processes, topology.lock_step
        num_bytes = costs["snapshot"].num_bytes
        bytes_per_learner_step = 2.0 * num_bytes * (num_processes - 1)
        if not cluster.is_here:
            speed = min(each.speed for each in cluster.groups)
            rate = min(each.gigabits_per_second for each in cluster.groups) * GIGABIT
            costs = with_messages(costs, num_processes, num_bytes, cluster.latency_seconds, rate)
    make = functools.partial(iteration_of, agent, topology.num_envs, costs, lock_step=lock_step)
    iteration, warmup = make(), make(learns=False)
    warmup_env_steps = 0 if agent.replay == "none" else agent.warmup_env_steps
    seconds = iteration.seconds / speed
    busy = {name: each / iteration.seconds for name, each in iteration.part_seconds.items()}
    largest = max(busy, key=lambda name: busy[name])
    moved = bytes_per_learner_step * iteration.learner_steps / iteration.env_steps
    return Speed(
        env_steps_per_second=iteration.env_steps / seconds,
        learner_steps_per_second=iteration.learner_steps / seconds,
        warmup_seconds=warmup.seconds / speed * warmup_env_steps / warmup.env_steps,
        warmup_env_steps=warmup_env_steps,
        busy=busy,
        limit=f"{largest}: it takes {busy[largest]:.0%} of the time",
        waits=_waits(busy, num_processes),
        moved_bytes_per_env_step=moved,
        wire_bytes_per_env_step=0.0 if cluster.is_here else moved,
    )


def _waits(busy: dict[str, float], num_processes: int) -> tuple[str, ...]:
    waits = []
    if "waiting for the learner" in busy:
        waits.append(f"environments wait {busy['waiting for the learner']:.0%} of the time for the learner")
    if num_processes > 1:
        waits.append(f"at every learner step, all {num_processes} processes wait for the slowest")
    return tuple(waits)


# --- What a change would bring ---


_Change = tuple[str, TrainConfig, Costs, Cluster]


def _what_ifs(
    config: TrainConfig, costs: Costs, cluster: Cluster, speed: Speed, more: OneMoreDevice | None
) -> list[WhatIf]:
    """Returns what one more process that acts, one more lane in each, one more core and one more GPU would bring."""
    found, changes = [], _changes(config, costs, cluster)
    if more:
        lane_growth = more.config.topology.num_envs / config.topology.num_envs
        changes.append((more.change, more.config, with_costs_of_shares(costs, lane_growth), cluster))
    for change, other, its_costs, its_cluster in changes:
        try:
            rate = _predict(other, its_costs, its_cluster, Budget(cpu_seconds=6.0)).env_steps_per_second
        except (ConfigError, RunFailed):  # the cluster has no room for it, or it takes too long to simulate
            continue
        gain = rate / speed.env_steps_per_second - 1
        found.append(WhatIf(change=change, env_steps_per_second=rate, gain=gain))
    return found


def _changes(config: TrainConfig, costs: Costs, cluster: Cluster) -> list[_Change]:
    topology: Any = config.topology
    changes: list[_Change] = []

    def with_topology(**fields: Any) -> TrainConfig:
        return dataclasses.replace(config, topology=dataclasses.replace(topology, **fields))

    for field, who, lanes in (
        ("num_actors", "actor", "lanes_per_actor"),
        ("num_workers", "worker", "lanes_per_worker"),
    ):
        if hasattr(topology, field):
            more = with_topology(**{field: getattr(topology, field) + 1})
            changes.append((f"one more {who}", more, costs, cluster))
            number = getattr(topology, lanes)
            more = with_topology(**{lanes: number + 1})
            changes.append((f"one more lane in each {who}", more, with_one_more_lane(costs, number), cluster))
    if isinstance(topology, GossipConfig):
        num_peers = topology.num_processes + 1
        more = with_topology(num_processes=num_peers, num_envs=topology.num_envs // topology.num_processes * num_peers)
        changes.append(("one more peer", more, costs, cluster))
    if not isinstance(topology, RayTopologyConfig | AllReduceConfig) and topology.mesh.num_devices == 1:
        costs_of_more = with_one_more_lane(costs, topology.num_envs)
        changes.append(("one more lane", with_topology(num_envs=topology.num_envs + 1), costs_of_more, cluster))
    where = "one more core" if cluster.num_nodes == 1 else "one more core in each node"
    changes.append((where, config, with_one_more_core(costs, cluster), cluster.with_more_cores()))
    return changes


_OF_LANES = ("row", "environment", "insert", "collect", "collect, new parameters", "act", "act, new parameters")
"""Parts whose cost grows with the number of lanes."""


def with_one_more_lane(costs: Costs, num_lanes: int) -> dict[str, Cost]:
    """Returns the costs with one more lane.

    They grow by what twice the lanes have cost, where that was measured, and in proportion otherwise: that is the most
    that a lane can cost.
    """
    found = dict(costs)
    for name in (*_OF_LANES, *(each + COLD for each in _OF_LANES)):
        if name in costs and costs[name].seconds:
            twice = costs.get(name.replace("collect", "collect, twice the lanes")) if "collect" in name else None
            more = costs[name].seconds if twice is None else max(0.0, twice.seconds - costs[name].seconds)
            found[name] = costs[name].times(1 + more / num_lanes / costs[name].seconds)
    return found


def with_one_more_core(costs: Costs, cluster: Cluster) -> dict[str, Cost]:
    """Returns the costs if parts that use all cores of this machine had one more."""
    here = num_cores()
    if not cluster.is_here:
        return dict(costs)
    return {
        name: dataclasses.replace(cost, width=cost.width * (here + 1) / here) if cost.width > 0.8 * here > 1 else cost
        for name, cost in costs.items()
    }


# --- Sizes ---


def _memory(costs: Costs) -> dict[str, int]:
    """Returns the memory of each kind of process that was measured."""
    of = "memory of "
    found = {name.removeprefix(of): cost.num_bytes for name, cost in costs.items() if name.startswith(of)}
    return found or {"process": costs["memory"].num_bytes}


def _num_processes(config: TrainConfig) -> dict[str, int]:
    match config.topology:
        case ActorLearnerConfig(num_actors=actors, num_replay_shards=shards):
            return {"director": 1, "learner": 1, "replay shard": shards, "actor": actors}
        case ParameterServerConfig(num_workers=workers, num_server_shards=servers, num_replay_shards=shards):
            found = {"director": 1, "server shard": servers, "replay shard": shards, "worker": workers}
            return {name: number for name, number in found.items() if number}
        case GossipConfig(num_processes=peers):
            return {"director": 1, "peer": peers}
        case AllReduceConfig(num_processes=number):
            return {"process": number}
    return {"process": 1}


def _num_params(kept: Footprint) -> int:
    return next((part.total_bytes // 4 for part in kept.parts if part.name == "parameters"), 0)


def _place(config: TrainConfig, cluster: Cluster) -> str:
    if cluster.is_here:
        return f"this machine, {cluster.num_cores:g} cores"
    if config.topology.runs_in == "this process":
        first = cluster.groups[0]
        return (
            f"a node of {first.name}, as if with this machine's {num_cores()} cores at {first.speed:g} times the speed"
        )
    nodes = "one node" if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes"
    return f"{nodes}, {cluster.num_cores:g} cores"
