"""The program of a worker process: it steps its share of the lanes on request.

Worker processes import this module, so it must not import JAX.
"""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from qfleet.config.errors import RAISED_BY_USERS
from qfleet.config.python_path import forget_safe_start, leave_module_folder
from qfleet.envs.failures import describe
from qfleet.envs.lane_group import LaneGroup, SingleEnv, make_arrays
from qfleet.envs.worker_signals import leave_to_parent


class Share(NamedTuple):
    """The share of the lanes that one worker steps, and what it needs for that."""

    env: SingleEnv
    num_lanes: int
    """Number of lanes of all workers together. They share one buffer."""
    max_failures: int
    """Number of failures that the run survives."""
    lanes: range
    """The lanes of this worker."""
    searches_module_folder: bool
    """Whether the folder with the user's modules is on the path only until the environments are made."""


def work(connection: Connection, buffer: Any, share: Share) -> None:
    """Answers `("reset", seed, rebuilds)` and `("step", actions)` until the other end closes.

    Each answer is the list of failures. Before that, it sends one message: `None` once the environments are made, or a
    line that says why they couldn't be.
    """
    leave_to_parent()
    # An environment may start processes itself, which Python forbids to daemons. This one ends with its pipe instead.
    multiprocessing.current_process().daemon = False
    forget_safe_start()
    lanes = slice(share.lanes.start, share.lanes.stop)
    out = make_arrays(share.num_lanes, share.env.encoder, buffer).of(lanes)
    try:
        group = LaneGroup(share.env, share.lanes, share.max_failures)
    except RAISED_BY_USERS as error:
        connection.send(describe(error))
        return
    if share.searches_module_folder:
        leave_module_folder()
    connection.send(None)
    try:
        while True:
            match connection.recv():
                case "reset", seed, rebuilds:
                    connection.send(group.reset(seed, rebuilds, out))
                case "step", actions:
                    connection.send(group.step(actions, out))
    except (EOFError, OSError):  # the parent has closed its end of the pipe, or has died
        group.close()
