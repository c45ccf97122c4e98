"""A gossip peer as a process on Ray, and how to read the snapshots that peers leave in Ray's object store."""

import logging
from collections.abc import Iterable
from typing import Any

import ray

from qfleet.topologies.fleet.supervisor import InRemoteProcess
from qfleet.topologies.gossip.averaging import Leaves
from qfleet.topologies.gossip.peer import GossipPeer

logger = logging.getLogger("qfleet")


class RemotePeer(InRemoteProcess, GossipPeer):
    """A peer in a process of its own."""


def fetch_snapshots(references: Iterable[Any]) -> list[Leaves]:
    """Returns the parameters that references point to. Those whose node has left are missing from the result."""
    found = []
    for reference in references:
        try:
            found.append(ray.get(reference))
        except ray.exceptions.RayError as error:  # the peer's next chunk will show that its process is lost
            logger.debug("a snapshot is lost: %s", error)
    return found
