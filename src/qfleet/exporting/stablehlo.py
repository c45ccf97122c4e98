"""A policy as a serialised StableHLO program, which JAX runs without qfleet."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from qfleet.config import ConfigError
from qfleet.config.errors import RAISED_BY_USERS, short
from qfleet.exporting.program import Program

PLATFORMS = ("cpu", "cuda")
"""Where the program can be run, whatever it was written on."""


def write_stablehlo(program: Program, path: Path) -> None:
    """Writes what `jax.export.deserialize` reads.

    Raises:
      ConfigError: if the network can't take a batch of any size.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = [jax.ShapeDtypeStruct((batch, *port.shape), port.dtype) for port in program.inputs]
    try:
        with _without_locations():
            exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)(*inputs)
    except RAISED_BY_USERS as error:  # a user's network may raise anything
        raise ConfigError(
            f"a network must take a batch of any size to be exported, got {short(error)}; in a network of your own, "
            f"use x.shape[0] in place of len(x), and -1 for the batch in shapes"
        ) from error
    path.write_bytes(exported.serialize())


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of programs, which would name them for each operation."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
