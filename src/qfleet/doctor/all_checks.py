"""All checks, by name, in the order in which they are shown."""

from collections.abc import Callable

from qfleet.doctor import cluster, machine, software
from qfleet.doctor.check import Check

CHECKS: dict[str, Callable[[], Check]] = {
    "devices": software.devices,
    "packages": software.packages,
    "extras": software.extras,
    "threads": machine.threads,
    "memory": machine.memory,
    "shared memory": machine.shared_memory,
    "open files": machine.open_files,
    "disk": machine.disk,
    "compile cache": software.cache,
    "Ray": cluster.cluster,
    "video": software.video,
}
"""Each takes no argument that must be given, and raises nothing but what nobody thought of."""
