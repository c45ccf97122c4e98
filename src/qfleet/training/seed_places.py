"""Where the seeds of a run are trained that has a process for each: how many at once, and what each process may use."""

import dataclasses
import math
import os

from qfleet.config import ConfigError, TrainConfig
from qfleet.config.checks import MAX_PROCESSES, check_count
from qfleet.config.lane_options import num_cores
from qfleet.runtime.child_process import share_cores, visible_gpus
from qfleet.runtime.devices import available_bytes, check_platforms_of_children
from qfleet.topologies.footprint import check_fits
from qfleet.training.assembly import footprint, make_env_and_network

_GPU_SHARE = 0.9
"""Share of a GPU's memory that all processes on it may take together."""


@dataclasses.dataclass(frozen=True)
class SeedPlaces:
    """Places for processes that train a seed each. A place is taken again once its process has ended."""

    environments: tuple[dict[str, str], ...]
    """Environment variables of the process in each place."""
    reason: str
    """What decided how many there are, in words."""

    @property
    def num_at_once(self) -> int:
        """How many seeds are trained at the same time."""
        return len(self.environments)


def check_num_at_once(config: TrainConfig, num_at_once: int | None) -> int | None:
    """Returns how many seeds the user wants to train at once, after checking it; None leaves it to `make_places`.

    Raises:
      ConfigError: if it isn't a count, or nothing is to be decided.
    """
    if num_at_once is None:
        return None
    if not config.has_seed_processes:
        raise ConfigError(
            f"num_seeds_at_once must be left out where all seeds are trained at once, in one program, got "
            f"{num_at_once} with num_seeds={config.num_seeds} and topology {config.topology.name}; leave it out"
        )
    return check_count("num_seeds_at_once", num_at_once, maximum=MAX_PROCESSES)


def make_places(config: TrainConfig, num_at_once: int | None) -> SeedPlaces:
    """Returns the places for the seeds of a run, after checking that one seed can be trained here.

    Args:
      config: of the run with all seeds.
      num_at_once: how many are trained at once; None for as many as GPUs, or else cores and memory, allow.

    Raises:
      ConfigError: if a seed can't be trained, as far as that is known before its process starts.
    """
    one, gpus = config.of_seed(config.seed), visible_gpus()
    check_platforms_of_children()
    limits = _limits(one, gpus)
    most, reason = min(limits, key=lambda limit: limit[0])
    if num_at_once is not None:
        most, reason = num_at_once, "as num_seeds_at_once says"
    count = max(1, min(most, config.num_seeds))
    if count == config.num_seeds:
        reason = "" if num_at_once is None else reason
    return SeedPlaces(tuple(_environment(i, count, gpus, one.topology.mesh.num_devices) for i in range(count)), reason)


def _limits(one: TrainConfig, gpus: list[str]) -> list[tuple[int, str]]:
    """Returns how many runs of one seed each resource allows at once, with the reason, after checking the run."""
    topology = one.topology
    found = None
    if not gpus:  # otherwise only the seed's own process may ask, because asking takes the GPU's memory
        found = footprint(one)  # this comes first, because it divides the CPU into the devices of all processes
        check_fits(one, found, footprint)
    make_env_and_network(one, None)
    if getattr(topology, "ray_address", None) not in (None, "local"):
        return [(1, "because each takes what the Ray cluster has")]
    busy = topology.num_busy_processes
    limits = [(num_cores() // busy, f"because one keeps {busy} busy, and this machine has {num_cores()} cores")]
    if gpus:
        devices = topology.mesh.num_devices
        limits.append((len(gpus) // devices, f"because one takes {devices} of this machine's {len(gpus)} GPUs"))
    available = available_bytes(found.devices) if found else None
    if found and available is not None:
        fitting = available // max(1, found.bytes_per_device)
        limits.append((fitting, "because no more fit into this machine's memory"))
    return limits


def _environment(place: int, num_at_once: int, gpus: list[str], num_devices: int) -> dict[str, str]:
    """Returns the environment variables of the process in a place, with its share of the cores and GPUs.

    Args:
      place: number of the place, from 0.
      num_at_once: number of places.
      gpus: the GPUs that this process may use.
      num_devices: devices of each process.
    """
    environment = dict(os.environ)
    if num_at_once > 1:
        share_cores(environment, num_at_once)
    if gpus:
        num_own = min(num_devices, len(gpus))  # where these are too few, the process says so
        own = [gpus[(place * num_own + i) % len(gpus)] for i in range(num_own)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        num_sharing = math.ceil(num_at_once * num_own / len(gpus))
        if num_sharing > 1:
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{_GPU_SHARE / num_sharing:.3f}")
    return environment
