"""Gloo's send buffers: the workaround widens them and no others, and it is still needed."""

import os
import socket
import subprocess
import sys

import pytest

from qfleet.runtime.workarounds import gloo_send_buffers
from qfleet.runtime.workarounds.gloo_send_buffers import SMALL_BUFFER_BYTES, widen_send_buffers

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lists the connections of a process"
)


def send_buffer_bytes(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def test_connections_with_hardly_any_send_buffer_get_one_and_others_are_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        small, usual = (socket.create_connection(server.getsockname()) for _ in range(2))
        with small, usual, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            usual.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
            sizes = send_buffer_bytes(usual), send_buffer_bytes(datagrams)
            assert send_buffer_bytes(small) < SMALL_BUFFER_BYTES
            widen_send_buffers()
            assert send_buffer_bytes(small) > 100_000
            assert (send_buffer_bytes(usual), send_buffer_bytes(datagrams)) == sizes
            accepted, _ = server.accept()
            with accepted:
                small.sendall(b"it is open")
                assert accepted.recv(100) == b"it is open"


COUNT_SMALL_BUFFERS = """
import os, socket, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from qfleet.runtime.workarounds.gloo_send_buffers import is_small_tcp, widen_send_buffers

def num_small():
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                count += is_small_tcp(connection)
        except OSError:
            pass  # no socket
    return count

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
multihost_utils.process_allgather(np.arange(3))  # opens the connections
before = num_small()
widen_send_buffers()
print(before, num_small())
jax.distributed.shutdown()
"""


def test_gloo_still_opens_connections_with_hardly_any_send_buffer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-c", COUNT_SMALL_BUFFERS, address]
    variables = os.environ | {"JAX_PLATFORMS": "cpu"}
    both = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=variables) for i in (0, 1)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for output in outputs:
        small, small_after = map(int, output.splitlines()[-1].split())  # the lines before it are Gloo's own
        assert small > 0, (
            "this workaround may be no longer needed: Gloo opened no connection with a small send buffer; if this is "
            f"so in every supported version of jaxlib, delete {gloo_send_buffers.__file__}, its test and its calls"
        )
        assert small_after == 0, "the workaround no longer finds Gloo's connections"
