"""Memory that the processes of a run on one machine share. Vectors are passed through it again and again.

Ray's object store takes milliseconds of CPU for each large array that one process passes to another. Here, one process
writes a vector to a buffer, another process reads it there, and only the buffer's address goes through Ray. The process
that owns the memory, which is the director's, decides who may write where and when: it hands out leases.

`multiprocessing.shared_memory` would not do. Its files outlive a process that is killed, and they lie in a folder for
which containers have little room.
"""

import mmap
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64
"""Every buffer begins at a multiple of so many bytes. XLA copies arrays that are not aligned before it uses them."""


class Buffer(NamedTuple):
    """The address of one piece of a vector in a `SharedRegion`. It is what processes send each other."""

    offset: int
    """First byte."""
    length: int
    """Numbers, not bytes."""
    dtype: str


Piece = np.ndarray | Buffer
"""One shard's piece of a vector, `[piece]`: the array itself, or the buffer that holds it."""


class ParameterBuffers(NamedTuple):
    """Where a shard of the server writes the parameters that it publishes."""

    params: Buffer
    target_params: Buffer | None
    """None if the target network stays the same."""


class Lease:
    """The right to use the buffers of one vector. It ends once nothing refers to this object any more."""

    def __init__(self, number: int, free: list[int]) -> None:
        """Leases the vector of this number; when the lease ends, the number returns to `free`."""
        self.number, self._free = number, free

    def __del__(self) -> None:
        """Returns the vector's buffers."""
        self._free.append(self.number)


class SharedRegion:
    """Memory for a fixed number of vectors. This process owns it; it leaves no file behind."""

    def __init__(self, num_vectors: int, piece_lengths: list[int]) -> None:
        """Reserves the memory; the system provides each page once something is written to it.

        Args:
          num_vectors: vectors that there is memory for.
          piece_lengths: length of each piece of a vector, in numbers of at most 4 bytes.
        """
        self._piece_lengths = piece_lengths
        self._piece_bytes = -(-4 * max(piece_lengths) // _ALIGNMENT) * _ALIGNMENT
        self._free = list(range(num_vectors))
        self._file = os.memfd_create("qfleet")
        os.ftruncate(self._file, num_vectors * len(piece_lengths) * self._piece_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        """The path that `RegionMapping` opens. It works until the region is closed."""

    def lease(self) -> Lease | None:
        """Returns a lease that nobody else has, or None if all are taken.

        The vector that was returned last is leased first, so that a run touches as few pages as it can.
        """
        return Lease(self._free.pop(), self._free) if self._free else None

    def buffers(self, lease: Lease, dtype: str) -> list[Buffer]:
        """Returns the buffer of each piece of a vector of this type."""
        first = lease.number * len(self._piece_lengths)
        return [Buffer((first + i) * self._piece_bytes, length, dtype) for i, length in enumerate(self._piece_lengths)]

    def close(self) -> None:
        """Closes the region. Processes that have mapped it keep it until they end."""
        os.close(self._file)


class RegionMapping:
    """A `SharedRegion`, as a process that writes to it or reads from it maps it."""

    def __init__(self, path: str | None) -> None:
        """Maps the region.

        Args:
          path: path of the `SharedRegion`; None if there is none, and every vector arrives as an array.
        """
        self._memory: Any = None
        if path is not None:
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)

    def write(self, array: np.ndarray, buffer: Buffer) -> None:
        """Writes a piece of a vector to its buffer."""
        self.read(buffer)[:] = array

    def read(self, piece: Piece) -> np.ndarray:
        """Returns a piece of a vector. If it lies in a buffer, it is valid only as long as the buffer is leased."""
        if isinstance(piece, np.ndarray):
            return piece
        return np.frombuffer(self._memory, jnp.dtype(piece.dtype), piece.length, piece.offset)


def can_share() -> bool:
    """Returns whether this system has such memory. Linux does, unless a policy forbids it."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        region = SharedRegion(1, [1])
    except OSError:
        return False
    try:
        RegionMapping(region.path)
    except OSError:
        return False
    finally:
        region.close()
    return True
