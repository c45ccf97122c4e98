"""The records that a plan consists of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qfleet.planning.costs import Costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a run would be, and why not faster."""

    env_steps_per_second: float
    """Over all lanes, once the run learns."""
    learner_steps_per_second: float
    warmup_seconds: float
    """Time until the first learner step."""
    warmup_env_steps: int
    """Environment steps by then."""
    busy: Mapping[str, float]
    """For each kind of process, and for the cores and links: the share of the time for which it is busy. Without
    processes that wait for each other: each part's share of the time."""
    limit: str
    """What limits the speed."""
    waits: tuple[str, ...] = ()
    """In sentences: what waits for what, and for how long."""
    moved_bytes_per_env_step: float = 0.0
    """Arrays that processes read from each other, on one machine or over the network."""
    wire_bytes_per_env_step: float = 0.0
    """Those that go from node to node."""
    num_lost: int = 0
    """Processes that were lost while the run was simulated."""
    simulated_seconds: float = 0.0

    def seconds_until(self, env_steps: int) -> float:
        """Returns the training time of so many environment steps, without start, evaluations and checkpoints."""
        if env_steps <= self.warmup_env_steps:
            return self.warmup_seconds * env_steps / self.warmup_env_steps
        return self.warmup_seconds + (env_steps - self.warmup_env_steps) / self.env_steps_per_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What a change of the run would bring."""

    change: str
    env_steps_per_second: float
    gain: float
    """Share by which the speed grows; negative if it falls."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What the literature says about a setting of the run."""

    text: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is predicted of a run."""

    env: str
    preset: str
    topology: str
    place: str
    """The nodes, in words."""
    env_steps: int
    seconds: float
    """Training time of all environment steps."""
    speed: Speed
    process_memory_bytes: Mapping[str, int]
    """For each kind of process, what one of them took when its parts were measured."""
    num_processes: Mapping[str, int]
    """For each kind of process, how many there are."""
    device_memory_bytes: Mapping[str, int]
    """What the run keeps on each device, by kind; on Ray, what all processes keep together."""
    what_if: tuple[WhatIf, ...]
    advice: tuple[Advice, ...]
    costs: Costs
    were_measured: bool
    """Whether the costs were measured for this plan, and not read from the disk."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as values that JSON can hold."""
        return dataclasses.asdict(self)
