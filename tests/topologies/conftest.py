"""What tests of topologies on Ray share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this machine, started once for all tests of a file: it takes some seconds."""
    pytest.importorskip("ray")
    from qfleet.topologies.fleet.cluster import connected

    with connected("local", 12, "ray_address"):
        yield
