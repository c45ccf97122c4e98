"""What a worker process runs: it steps its share of the lanes whenever it is told to. No JAX."""

import signal
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from qfleet.envs.failures import describe
from qfleet.envs.lane_group import LaneGroup, SingleEnv, make_arrays


class Share(NamedTuple):
    """What one worker needs to know."""

    env: SingleEnv
    num_lanes: int
    """Of all workers together, which share one buffer."""
    max_failures: int
    lanes: range


def work(connection: Connection, buffer: Any, share: Share) -> None:
    """Answers `("reset", seed, rebuilds)` and `("step", actions)` with lists of failures, until the other end closes.

    The first message is `None` once the environments are made, or a line on why they couldn't be.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us as well, but the parent decides when we end
    lanes = slice(share.lanes.start, share.lanes.stop)
    out = make_arrays(share.num_lanes, share.env.encoder, buffer).of(lanes)
    try:
        group = LaneGroup(share.env, share.lanes, share.max_failures)
    except Exception as error:
        connection.send(describe(error))
        return
    connection.send(None)
    try:
        while True:
            match connection.recv():
                case "reset", seed, rebuilds:
                    connection.send(group.reset(seed, rebuilds, out))
                case "step", actions:
                    connection.send(group.step(actions, out))
    except (EOFError, OSError):  # the parent has closed its end, or is gone
        group.close()
