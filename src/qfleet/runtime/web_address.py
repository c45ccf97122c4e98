"""An address of this machine that a server listens on, and who may ask it.

Whoever is on this machine may ask under a loopback address. On another address every request must bear a token.
"""

import contextlib
import hmac
import ipaddress
import secrets
import signal
import socket
from typing import TYPE_CHECKING

from qfleet.config import ConfigError

if TYPE_CHECKING:
    import uvicorn


class WebAddress:
    """A socket that listens on an address, and the token that requests must bear there."""

    def __init__(self, host: str, port: int, server: str, token: str | None = None) -> None:
        """Takes the port, so that nobody else can.

        Args:
          host: address or name to listen on.
          port: port to listen on; 0 takes a free one.
          server: what listens there, in words that begin an error, such as "a dashboard".
          token: to bear on an address that isn't a loopback address. None makes one.

        Raises:
          ConfigError: if that address can't be had.
        """
        self.socket = _listen(host, port, server)
        """The socket that it listens on."""
        address, self.port = self.socket.getsockname()[:2]
        self.is_local = ipaddress.ip_address(address).is_loopback
        """Whether only this machine can ask."""
        self.token = None if self.is_local else token or secrets.token_urlsafe(32)
        """What every request must bear; None if only this machine can ask."""
        shown = f"[{address}]" if ":" in address else address
        self.url = f"http://{shown}:{self.port}/"
        """What leads to it, without the token."""
        self._own_hosts = {f"{name}:{self.port}" for name in (shown, "localhost", "127.0.0.1", "[::1]")}

    def is_own_name(self, host: str) -> bool:
        """Returns whether a request's Host header names this machine by a loopback name.

        A page of somebody else's may have its name point to this machine, and then ask as if it were ours.
        """
        return host.lower() in self._own_hosts

    def is_token(self, given: str) -> bool:
        """Returns whether a request bears the token."""
        return hmac.compare_digest(given.encode(), (self.token or "").encode())


def run_until_stopped(server: "uvicorn.Server", address: WebAddress) -> None:
    """Runs a server in the main thread until SIGINT or SIGTERM. It answers what is under way, and then returns."""
    # uvicorn ends in order, and then raises the signal again, as if nobody had heard it.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[address.socket])
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(host: str, port: int, server: str) -> socket.socket:
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:
        if made is not None:
            made.close()
        raise ConfigError(
            f"{server} must have an address of this machine to listen on, got {host} port {port} ({error}); give "
            f"another --host or --port"
        ) from error
    return made
