"""Fixtures for tests of topologies on Ray."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine. Starting it takes some seconds, so all tests of a file share it."""
    pytest.importorskip("ray")
    from qfleet.topologies.fleet.cluster import connected

    with connected("local", 12, "ray_address"):
        yield
