"""What it costs a fleet's learner and director to give actors 6.8 MB of new parameters, for 1 actor and for 16.

python benchmarks/fleet_broadcast.py [--repeats 3]

The actors do nothing but read one parameter, and their own CPU time isn't counted.
"""

import argparse
import os
import statistics
from typing import Any

import common
import numpy as np
from fleet_limits import cpu_seconds

from qfleet.topologies.fleet.calls import Inbox
from qfleet.topologies.fleet.cluster import connected
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import InRemoteProcess, RemoteProcess
from qfleet.topologies.fleet.supervisor import Supervisor, carrier_of

NUM_PARAMS = 1_700_000
ROUNDS = 100
"""Rounds in a row that are alike."""


class Publisher(InRemoteProcess):
    """Stands for a learner that learns nothing."""

    def publish(self) -> Reference[np.ndarray]:
        """Returns new parameters."""
        return Reference(np.zeros(NUM_PARAMS, np.float32))


class Reader(InRemoteProcess):
    """Stands for an actor that doesn't act."""

    def collect(self, params: Reference[np.ndarray]) -> float:
        """Reads one parameter."""
        return float(params.value[0])


class Fleet:
    """A learner and actors, which a director in this process calls in rounds."""

    def __init__(self, num_actors: int) -> None:
        """Starts all processes."""
        self._supervisor, inbox = Supervisor(60.0, 0), Inbox()
        self._supervisor.open(inbox, carrier_of(inbox, is_one_machine=True))
        self._learner = self._start("learner", Publisher)
        self._actors = [self._start(f"actor {i}", Reader) for i in range(num_actors)]
        self._params: Reference[np.ndarray] = Reference()

    def _start(self, name: str, kind: type) -> RemoteProcess[Any]:
        return self._supervisor.add(RemoteProcess(name, kind, (), {"CPU": 1}, {"JAX_PLATFORMS": "cpu"}, lambda: None))

    def rounds(self, *, have_new_params: bool) -> float:
        """Calls all actors again and again, with new parameters each time or with the same, and returns CPU seconds."""
        pids = [os.getpid(), *([self._learner.place[0]] if self._learner.place else [])]
        before = cpu_seconds(pids)
        for _ in range(ROUNDS):
            replies: list[Any] = []
            if have_new_params:
                self._params = Reference()
                publish = Publisher.publish
                self._supervisor.submit(self._learner, publish, on_reply=replies.append, results=[self._params])
                self._wait_for(replies, 1)
            for actor in self._actors:
                self._supervisor.submit(actor, Reader.collect, self._params, on_reply=replies.append)
            self._wait_for(replies, have_new_params + len(self._actors))
        return cpu_seconds(pids) - before

    def _wait_for(self, replies: list[Any], count: int) -> None:
        while len(replies) < count:
            self._supervisor.wait(0.1)
            self._supervisor.process_replies()

    def close(self) -> None:
        """Ends all processes."""
        self._supervisor.terminate()


def milliseconds_per_broadcast(num_actors: int) -> float:
    """Returns the CPU time of a round with new parameters, less that of one without."""
    fleet = Fleet(num_actors)
    try:
        fleet.rounds(have_new_params=True)  # these start the processes
        new, same = (sum(fleet.rounds(have_new_params=is_new) for _ in range(4)) for is_new in (True, False))
    finally:
        fleet.close()
    return 1e3 * (new - same) / (4 * ROUNDS)


def main() -> None:
    """Prints the table. The sizes alternate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    costs: dict[int, list[float]] = {1: [], 16: []}
    with connected("local", 17, "ray_address"):
        for _ in range(parser.parse_args().repeats):
            for num_actors, found in costs.items():
                found.append(milliseconds_per_broadcast(num_actors))
    medians = {num_actors: statistics.median(found) for num_actors, found in costs.items()}
    common.report(
        "fleet broadcast",
        [
            {"actors": each, "cpu_ms_per_broadcast": medians[each], "against_1": medians[each] / medians[1]}
            for each in medians
        ],
    )


if __name__ == "__main__":
    main()
