"""What equal processes agree on, and the connections between them."""

import socket
import sys

import pytest

from qfleet.runtime import peers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists a process's connections")
def test_connections_with_hardly_any_send_buffer_are_given_one_and_others_left_alone():
    def size(connection: socket.socket) -> int:
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    with socket.create_server(("127.0.0.1", 0)) as server:
        small, usual = (socket.create_connection(server.getsockname()) for _ in range(2))
        with small, usual, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            usual.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
            sizes = size(usual), size(datagrams)
            assert size(small) < 10_000
            peers.widen_send_buffers()
            assert size(small) > 100_000
            assert (size(usual), size(datagrams)) == sizes
            accepted, _ = server.accept()
            with accepted:
                small.sendall(b"it is open")
                assert accepted.recv(100) == b"it is open"
