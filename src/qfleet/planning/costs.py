"""The costs of the parts of a run, and the file that keeps them beside the compilation cache."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qfleet.config import TrainConfig
from qfleet.config.encoding import encode
from qfleet.config.lane_options import num_cores
from qfleet.runtime.cache import CacheUnusable, usable_cache_folder
from qfleet.runtime.run_files import UnusableFile, read_json, temporary_of

logger = logging.getLogger("qfleet")

_FORMAT = 2
"""Version of the parts and of their file: a higher one makes every machine measure anew."""

_CHANGE_NO_COST = {
    "env_steps_per_learner_step", "warmup_env_steps", "discount", "learning_rate", "exploration_start",
    "exploration_end", "exploration_env_steps", "exploration_fraction", "exploration_schedule",
    "learning_rate_end_fraction", "learning_rate_learner_steps", "learning_rate_fraction", "trace_decay",
    "priority_exponent", "importance_exponent_start", "importance_exponent_env_steps", "importance_exponent_fraction",
    "target_update_period", "target_update_rate",
}  # fmt: skip
"""Settings of an agent on which no part's cost depends."""

_MOST_MEDIANS = 4.0
"""What a call counts at most, as a multiple of the median."""

_PACKAGES = ("qfleet", "jax", "jaxlib", "numpy", "flax", "optax", "ray", "gymnasium")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part takes."""

    cpu_seconds: float
    """Work of the CPU cores."""
    width: float = 1.0
    """Number of cores that share this work."""
    wait_seconds: float = 0.0
    """Time after the work in which the part waits for something that is no core of this process: a device, or another
    process."""
    num_bytes: int = 0
    """Size of the arrays that the part makes for other processes."""

    @property
    def seconds(self) -> float:
        """Time that it takes if the cores do nothing else."""
        return self.cpu_seconds / self.width + self.wait_seconds

    def times(self, factor: float) -> "Cost":
        """Returns this cost as often, or on a machine that takes so many times as long."""
        return dataclasses.replace(self, cpu_seconds=self.cpu_seconds * factor, wait_seconds=self.wait_seconds * factor)

    def plus(self, other: "Cost") -> "Cost":
        """Returns the cost of both, one after the other."""
        work, seconds = self.cpu_seconds + other.cpu_seconds, self.cpu_seconds / self.width
        seconds += other.cpu_seconds / other.width
        return Cost(
            work,
            work / seconds if seconds else 1.0,
            self.wait_seconds + other.wait_seconds,
            self.num_bytes + other.num_bytes,
        )


NOTHING = Cost(0.0)

COLD = ", cold"
"""Ends the name of what a part costs a process of a run on Ray that begins after a pause, or shares its core."""

Costs = Mapping[str, Cost]
"""The cost of each part, by name."""


def cost_of(
    cpu_seconds: Sequence[float], wall_seconds: Sequence[float], num_bytes: int = 0, *, is_coupled: bool = False
) -> Cost:
    """Returns the cost of a part that was timed at least twice.

    Work is the mean of the CPU's time, because a run takes the slow calls, too; a call that took many times as long as
    the others counts as a few of them. Other programs make the wall time longer. So a difference to the CPU's time
    counts as waiting only as far as most calls have it, and the number of cores is that of the calls that had most.

    Args:
      cpu_seconds: time of all threads of the process, of each call.
      wall_seconds: wall time of each call.
      num_bytes: size of the arrays that the part makes for other processes.
      is_coupled: whether each call waits for another process that does the same, for a time that differs.
    """
    most = _MOST_MEDIANS * statistics.median(cpu_seconds)
    work = statistics.mean(min(each, most) for each in cpu_seconds)
    both = list(zip(cpu_seconds, wall_seconds, strict=True))
    width = statistics.quantiles([cpu / wall for cpu, wall in both], n=4)[2]
    width = width if width > 1.15 else 1.0
    slack = [wall - cpu / width for cpu, wall in both]
    waiting = statistics.median(slack) if is_coupled else statistics.quantiles(slack, n=4)[0]
    return Cost(work, width, max(0.0, waiting), num_bytes)


def key_of(config: TrainConfig, devices: str) -> dict[str, Any]:
    """Returns all that the costs of a run's parts depend on: the machine, versions, environment, agent and topology.

    Args:
      config: of the run.
      devices: the kind of devices that learn.
    """
    encoded = encode(config)
    agent = {name: value for name, value in encoded["agent"].items() if name not in _CHANGE_NO_COST}
    return {
        "format": _FORMAT,
        "machine": [platform.node(), platform.machine(), _cpu_model(), num_cores(), devices],
        "versions": {"python": platform.python_version(), **_versions()},
        "env": [encoded["env"], encoded["env_options"]],
        "agent": agent,
        "topology": encoded["topology"],
        "variables": {name: os.environ[name] for name in ("XLA_FLAGS", "PJRT_NPROC") if name in os.environ},
    }


def read_costs(key: Mapping[str, Any]) -> Costs | None:
    """Returns the costs that were kept for a key; None if there are none."""
    try:
        path = _path_of(key)
        kept = read_json(path) if path else None
    except (OSError, UnusableFile):  # none yet, or not whole: they are measured anew
        return None
    if not isinstance(kept, dict) or kept.get("digest") != _digest([key, kept.get("costs")]):
        return None
    return {name: Cost(**cost) for name, cost in kept["costs"].items()}


def write_costs(key: Mapping[str, Any], costs: Costs) -> None:
    """Keeps costs for a key. Where that can't be, a warning says so, and they are measured again next time."""
    if path := _path_of(key):
        content = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
        kept = {"key": key, "costs": content, "digest": _digest([key, content])}
        temporary = temporary_of(path)  # so that the file is there whole or not at all
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                temporary.write_text(json.dumps(kept, indent=1) + "\n")
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("what the parts cost can't be kept in %s, and is measured again next time: %s", path, error)


def _path_of(key: Mapping[str, Any]) -> Path | None:
    try:
        folder = usable_cache_folder()
    except CacheUnusable:
        return None
    return folder / "plans" / f"{_digest(key)[:20]}.json"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
