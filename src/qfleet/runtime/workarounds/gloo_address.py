"""Gloo listens at the address that the machine's name stands for. Seen in JAX 0.10.2 and 0.11.2.

JAX exchanges arrays between processes on CPUs through Gloo. The machine's name often stands for an address that other
machines can reach. Or it stands for none, and then no process can start. JAX has no setting for the address, so this
module changes a private function.
"""

import functools


def listen_on(host: str) -> None:
    """Makes Gloo listen at another address of this machine. Call this before JAX is used."""
    from jax._src import xla_bridge

    library = xla_bridge._jax  # type: ignore[attr-defined]
    library.make_gloo_tcp_collectives = functools.partial(library.make_gloo_tcp_collectives, hostname=host)
