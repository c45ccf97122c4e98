"""`qfleet serve RUN`."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qfleet.cli.flag_types import FLAG_TYPES
from qfleet.cli.show import status_line
from qfleet.config import ConfigError
from qfleet.config.checks import MAX_SECONDS, check, check_checkpoint, check_count
from qfleet.runtime.finding_runs import POLICY_HELP, find_run

if TYPE_CHECKING:
    from qfleet.policy import Policy

TOKEN_VARIABLE = "QFLEET_SERVE_TOKEN"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ServeFlags:
    """Answers observations with the actions of what a run has learned, over HTTP.

    POST /act takes a batch of observations; GET /policy says what they look like. SIGHUP loads the policy anew.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=POLICY_HELP)]
    host: str = "127.0.0.1"
    """Address to listen on. On any but a loopback address, requests must bear a token: that of the variable
    QFLEET_SERVE_TOKEN, or one that is printed."""
    port: int = 8000
    """Port to listen on. 0 takes a free one."""
    checkpoint: int | Literal["best"] | None = None
    """Environment step of the checkpoint to serve, or `best` for that of the best evaluation.
    The default is the newest one."""
    train_seed: int | None = None
    """Seed to serve, of a run with several seeds. The default is the first one."""
    max_batch: int = 256
    """Most observations that the policy sees at once, and most in one request."""
    max_delay_ms: float = 1.0
    """Longest time in milliseconds that an observation waits for others to join its batch."""
    max_waiting: int = 4096
    """Most observations that may wait for their turn. Further requests are told to come back (503)."""
    max_request_bytes: int = 16_000_000
    """Largest request."""
    max_observations_per_second: float | None = None
    """Most observations per second, over all requests. Further ones are told to come back (429). The default is no
    limit."""
    max_sessions: int = 1024
    """Most episodes whose memory is kept, of a policy that remembers something."""
    session_seconds: float = 600.0
    """Time without an observation after which a session makes room for another."""
    trust: bool = False
    """Import modules (MODULE:NAME, of the environment or the agent's parts) that only the run's folder names.
    Importing runs their code."""


def run(arguments: Sequence[str]) -> int:
    """Serves the policy that the flags name, until a signal asks to stop."""
    flags = tyro.cli(_ServeFlags, prog="qfleet serve", args=list(arguments), registry=FLAG_TYPES)
    check_count("port", flags.port, minimum=0, maximum=65_535)
    check_checkpoint(flags.checkpoint)
    is_delay = 0 <= flags.max_delay_ms <= 1000 * MAX_SECONDS
    check(is_delay, "max_delay_ms", f"a number from 0 to {1000 * MAX_SECONDS}", flags.max_delay_ms)
    run_dir = find_run(flags.run)
    from qfleet.serving.limits import ServingLimits
    from qfleet.serving.needs import check_extra

    limits = ServingLimits(
        max_batch=flags.max_batch,
        max_delay_seconds=flags.max_delay_ms / 1000,
        max_waiting=flags.max_waiting,
        max_request_bytes=flags.max_request_bytes,
        max_observations_per_second=flags.max_observations_per_second,
        max_sessions=flags.max_sessions,
        session_seconds=flags.session_seconds,
    )
    check_extra()
    from qfleet.runtime.signals import interrupts_held_back
    from qfleet.runtime.web_address import WebAddress

    address = WebAddress(flags.host, flags.port, "a server", token := given_token())
    with interrupts_held_back():
        from qfleet.api import load
        from qfleet.runtime.activity import announce
        from qfleet.serving.server import PolicyServer

    def load_policy() -> "Policy":
        return load(run_dir, checkpoint=flags.checkpoint, seed=flags.train_seed, trust=flags.trust)

    hangups: list[int] = []
    with contextlib.suppress(AttributeError):  # there is no such signal on Windows
        signal.signal(signal.SIGHUP, lambda number, _: hangups.append(number))
    with status_line():
        announce("loading and compiling")
        server = PolicyServer(load_policy, address, limits)
    print(f"serving {server.label} at {address.url} (Ctrl-C ends it, SIGHUP loads the policy anew)", flush=True)
    if address.token is not None:
        if token is None:
            print(f"token: {address.token}", flush=True)
        print("qfleet: the connection isn't encrypted; let a proxy with TLS stand before it", file=sys.stderr)
    server.serve(reloads_first=lambda: bool(hangups))
    return 0


def given_token() -> str | None:
    """Returns the token of the user's environment, without white space around it; None if there is none.

    Raises:
      ConfigError: if no request could bear it.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"{TOKEN_VARIABLE} must be printable ASCII without spaces, as a header can bear it, got other characters; "
            f"choose another, or leave it out and the server makes one"
        )
    return token or None
