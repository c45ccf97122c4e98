"""Everything that qfleet uses of Ray's private modules, because Ray offers no public way to do the same.

Last seen to be needed, and to work, with Ray 2.60.0. When Ray no longer needs one of them, a test fails that says which
function to delete: in tests/topologies/fleet, test_cluster.py for `on_loopback` and `path_of_this_process_only`,
test_ray_internals.py for the other.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Makes a Ray that is started meanwhile listen on the loopback interface only.

    By default, on Linux, Ray listens on all interfaces. Where it can't form a cluster, as on macOS, it keeps to
    loopback, and so this function tells Ray that it can't. No public setting asks for that: Ray replaces a
    `_node_ip_address` of 127.0.0.1 by the address that other machines know.
    """
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


class _JobConfig(ray.job_config.JobConfig):
    """Settings of this process's job on Ray that keep its script's folder and its current folder to itself."""

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def path_of_this_process_only() -> ray.job_config.JobConfig:
    """Returns the settings of a job whose processes don't search this process's current folder for modules.

    By default they search it before all other folders, so that a random.py in it would run in each of them. Ray leaves
    it out only where the user's folder is uploaded, and so this class tells Ray that it is.
    """
    return _JobConfig()


def read_variables_again() -> None:
    """Makes Ray read its environment variables again. By itself it reads them once, when it is imported."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    if hasattr(raylet, "AuthenticationTokenLoader"):  # older versions have no tokens
        raylet.AuthenticationTokenLoader.instance().reset_cache()
