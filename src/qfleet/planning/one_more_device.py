"""What one more device, such as a GPU, would bring to a learner that is spread over a mesh of devices.

Each device along the mesh's data axis has an equal share of the lanes, of the replay and of each batch. What a share
costs is measured on one device. What the devices send each other is calculated, because there may be no further device
to measure it with.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from qfleet.config import ActorLearnerConfig, ConfigError, FusedConfig, OverlappedConfig, TrainConfig
from qfleet.core.updates import lanes_per_group
from qfleet.planning.costs import COLD, Cost, Costs
from qfleet.planning.in_step import BESIDE_UPDATES, all_reduce, overlap
from qfleet.topologies.footprint import Footprint

LINK_BYTES_PER_SECOND = 20e9
"""Rate at which each device sends and receives: two thirds of what PCIe 4.0 x16 carries."""

MESSAGE_SECONDS = 1e-5
"""Time of the smallest message between two devices. So eight devices take 60 us to add up two numbers, for which NCCL
is reported to take 40 us over PCIe (github.com/NVIDIA/nccl/issues/1530)."""

SHARE = ", one more device"
"""Ends the name of what a part costs each device if there is one more."""

ALL_REDUCE = "all-reduce"
"""Name of what the devices then take to exchange gradients, and what else they need of each other, beside `learn`."""


class OneMoreDevice(NamedTuple):
    """A run on one more device along the mesh's data axis."""

    change: str
    """The change in words, with the sizes that divide over the devices."""
    config: TrainConfig
    share: TrainConfig
    """A run on one device that does what each of them would do."""


def with_one_more_device(config: TrainConfig, platform: str) -> OneMoreDevice | None:
    """Returns a run on one more device, with lanes and batch rounded up to what divides over the devices.

    Args:
      config: of the run as it is.
      platform: of the devices that learn, by JAX's name.

    Returns:
      None if no such run is possible, or on CPUs: their devices share the cores, so one more brings no more compute.
    """
    topology, agent = config.topology, config.agent
    if platform == "cpu" or not isinstance(topology, FusedConfig | OverlappedConfig | ActorLearnerConfig):
        return None
    number, sizes, has_replay = topology.mesh.data + 1, [], agent.replay != "none"
    num_lanes, batch_size = 0, math.ceil(agent.batch_size / number)
    if not isinstance(topology, ActorLearnerConfig):
        length = agent.rollout_length if agent.memory == "none" else 1  # a memory's minibatches take whole lanes
        unit = 1 if has_replay else lanes_per_group(length, agent.num_minibatches)
        num_lanes = math.ceil(topology.num_envs / (number * unit)) * unit
        sizes.append(f"{topology.num_envs} lanes -> {number} x {num_lanes}")
    if has_replay:
        sizes.append(f"batch {agent.batch_size} -> {number} x {batch_size}")

    def on(shares: int) -> TrainConfig:
        fields: dict[str, Any] = {"mesh": dataclasses.replace(topology.mesh, data=shares)}
        if num_lanes:
            fields["num_envs"] = shares * num_lanes
        if isinstance(topology, OverlappedConfig):
            fields["num_env_workers"] = min(topology.num_env_workers, shares * num_lanes)
        capacity = math.ceil(agent.replay_capacity * shares / number)
        its_agent = dataclasses.replace(agent, batch_size=shares * batch_size, replay_capacity=capacity)
        return dataclasses.replace(config, agent=its_agent, topology=dataclasses.replace(topology, **fields))

    kind = "GPU" if platform == "gpu" else "device"
    change = f"one more {kind}" if topology.mesh.model == 1 else f"{topology.mesh.model} more {kind}s"
    try:
        return OneMoreDevice(f"{change} ({', '.join(sizes)})", on(number), on(1))
    except ConfigError:  # such as a replay that is too small for the lanes that rounding up adds
        return None


def costs_of_shares(
    more: OneMoreDevice, costs: Costs, of_share: Costs, kept: Footprint, batches: tuple[int, int]
) -> Costs:
    """Returns what parts cost each device if there is one more, and what the devices take to exchange gradients.

    Args:
      more: the run on one more device.
      costs: of the run as it is.
      of_share: of the parts of `more.share`.
      kept: footprint of the run as it is.
      batches: numbers of batches that `learn` has in `more.config` and in `more.share`.
    """
    config, num_bytes, num_sums = more.config, kept.bytes_per_device_of("parameters"), 1
    if isinstance(config.topology, ActorLearnerConfig):
        num_sums, ratio = 2, batches[0] / batches[1]  # the greatest importance weight, and the gradients
        found = {  # the host puts batches together as before, so only the wait for the device becomes shorter
            name + SHARE: dataclasses.replace(costs[name], wait_seconds=ratio * of_share[name].wait_seconds)
            for name in ("learn", "learn" + COLD)
            if name in costs and name in of_share
        }
    else:
        found = {name + SHARE: of_share[name] for name in ("row", "act", "insert", "learn") if name in of_share}
        if config.agent.replay != "none":
            num_sums = 5  # what each replay holds, the batch, its weights, the gradients, and the priorities
            # An all-reduce adds up and hands out. A batch is only dealt, so it moves half as many bytes.
            num_bytes += sum(part.total_bytes for part in kept.parts if part.name == "batch") // 2
    once = all_reduce(config.topology.mesh.data, num_bytes, num_sums * MESSAGE_SECONDS, LINK_BYTES_PER_SECOND)
    return {**found, ALL_REDUCE: once.times(batches[0])}


def with_costs_of_shares(costs: Costs, lane_growth: float) -> Costs:
    """Returns the costs of the run on one more device.

    Args:
      costs: of the run as it is, and of shares.
      lane_growth: factor by which rounding up makes the lanes more. Environments that the host steps aren't divided.
    """
    found = dict(costs)
    for name, cost in costs.items():
        if name.endswith(SHARE):
            found[name.removesuffix(SHARE)] = cost.plus(costs[ALL_REDUCE]) if name.startswith("learn") else cost
    if "environment" in costs:
        found["environment"] = costs["environment"].times(lane_growth)
    if "environment beside learning" in costs:  # each hides as large a share of the other as it does now
        learning = found["insert"].seconds + BESIDE_UPDATES * found["learn"].seconds
        stepping = found["environment"].seconds
        both = learning + stepping - overlap(costs) * min(learning, stepping)
        found["environment beside learning"] = Cost(0.0, wait_seconds=both)
    return found
