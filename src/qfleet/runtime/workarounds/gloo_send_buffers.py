"""Gloo opens connections with the smallest send buffer that TCP allows. Seen in jaxlib 0.10.2 on Linux.

JAX exchanges arrays between processes on CPUs through Gloo. With so small a buffer, a message must wait until the one
before it is acknowledged. If nothing travels in the other direction, TCP delays that acknowledgement by up to 40 ms.
Gloo has no setting for it, and JAX does not show the connections. So this module finds them among the open files of the
process, in /proc/self/fd.
"""

import os
import socket
import stat
import sys

SEND_BUFFER_BYTES = 2**22
"""Size of the send buffer to ask for. The system may grant less."""

SMALL_BUFFER_BYTES = 2**16
"""A TCP connection with a smaller send buffer than this is taken for one of Gloo's."""


def widen_send_buffers() -> None:
    """Gives every TCP connection of this process that has hardly any send buffer a large one. Linux only.

    Gloo opens its connections when a program that communicates runs for the first time. So call this again after the
    first run of every such program.
    """
    if not sys.platform.startswith("linux"):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # it was closed in the meantime
            continue
        with connection:
            if is_small_tcp(connection):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def is_small_tcp(connection: socket.socket) -> bool:
    """Returns whether a socket is a TCP connection with hardly any send buffer."""
    is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
    is_tcp = is_internet and connection.type == socket.SOCK_STREAM
    return is_tcp and connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < SMALL_BUFFER_BYTES
