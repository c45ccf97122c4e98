"""Memory that the parts of a run on one machine share, for vectors that are handed on again and again.

Ray's object store takes milliseconds of CPU for each large array that changes hands. Here one process writes a vector
to its place, another reads it there, and only the place goes by Ray. Who may write where and when is decided by the
process that owns the memory.

Not by `multiprocessing.shared_memory`: its files outlive a process that is killed, and lie where containers have little
room.
"""

import mmap
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64
"""Bytes that vectors begin at a multiple of: XLA copies what isn't aligned before it computes with it."""


class Place(NamedTuple):
    """Where a vector is."""

    offset: int
    """In bytes."""
    length: int
    dtype: str


class Slot:
    """Room for one vector in pieces, for as long as anything refers to this object."""

    def __init__(self, number: int, free: list[int]) -> None:
        self.number, self._free = number, free

    def __del__(self) -> None:
        self._free.append(self.number)


class SharedMemory:
    """Memory in slots, owned by this process. It is gone with it, and leaves no file behind."""

    def __init__(self, num_slots: int, lengths: list[int]) -> None:
        """Makes the memory, of which the system takes nothing before something is written.

        Args:
          num_slots: vectors that there is room for.
          lengths: of the pieces of each vector, of at most 4 bytes a number.
        """
        self._lengths = lengths
        self._piece_bytes = -(-4 * max(lengths) // _ALIGNMENT) * _ALIGNMENT
        self._free = list(range(num_slots))
        self._file = os.memfd_create("qfleet")
        os.ftruncate(self._file, num_slots * len(lengths) * self._piece_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        """Where `Window` finds it, as long as it isn't closed."""

    def slot(self) -> Slot | None:
        """Returns a slot that nobody else has, None if there is none left: the one last used of those that are free."""
        return Slot(self._free.pop(), self._free) if self._free else None

    def places(self, slot: Slot, dtype: str) -> list[Place]:
        """Returns where each piece of a vector goes."""
        first = slot.number * len(self._lengths)
        return [Place((first + i) * self._piece_bytes, length, dtype) for i, length in enumerate(self._lengths)]

    def close(self) -> None:
        """Lets go of it; processes that have it open keep it until they end."""
        os.close(self._file)


def can_share() -> bool:
    """Returns whether this system has such memory, as Linux does where nothing forbids it."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        memory = SharedMemory(1, [1])
    except OSError:
        return False
    try:
        Window(memory.path)
    except OSError:
        return False
    finally:
        memory.close()
    return True


class Window:
    """The memory of another process of this machine."""

    def __init__(self, path: str | None) -> None:
        """Opens it.

        Args:
          path: of `SharedMemory`, None if there is none, and all vectors come by themselves.
        """
        self._memory: Any = None
        if path is not None:
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)

    def put(self, vector: np.ndarray, place: Place) -> None:
        """Writes a vector to its place."""
        self.get(place)[:] = vector

    def get(self, handed: "np.ndarray | Place") -> np.ndarray:
        """Returns the vector that was handed on; one at a place stays what it is only while its slot is kept."""
        if isinstance(handed, np.ndarray):
            return handed
        return np.frombuffer(self._memory, jnp.dtype(handed.dtype), handed.length, handed.offset)
