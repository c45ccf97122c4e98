"""Memory that the processes of a run on one machine share.

The director's process owns the memory, an `Arena`, and decides who may write where: it leases blocks. A process writes
a value to a block that was leased for it, tells the director where the value lies, and other processes read it there.
A block is leased again once nothing in the director's process refers to it.

The arena is an anonymous file (`memfd_create`), so nothing is left behind in a folder or in /dev/shm, whoever is
killed. `multiprocessing.shared_memory` would not do: its files outlive a process that is killed, and they lie in a
folder for which containers have little room.
"""

import mmap
import os
import pickle
from typing import Any, NamedTuple

from qfleet.config import RunFailed

_ALIGNMENT = 64
"""Every array begins at a multiple of so many bytes. XLA copies arrays that are not aligned before it uses them."""

_PAGE = 4096


class Address(NamedTuple):
    """Where a value lies in the arena, as processes tell each other."""

    offset: int
    lengths: tuple[int, ...]
    """Bytes of each part of the value. The first part says how to put the others together."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the arena."""
        return sum(map(_aligned, self.lengths))


class Block:
    """A leased part of the arena. The lease ends when nothing refers to this object any more."""

    __slots__ = ("_arena", "capacity", "offset")

    def __init__(self, arena: "Arena", offset: int, capacity: int) -> None:
        """Leases these bytes."""
        self._arena, self.offset, self.capacity = arena, offset, capacity

    def __del__(self) -> None:
        """Gives the bytes back."""
        self._arena.take_back(self.offset, self.capacity)


class Stored(NamedTuple):
    """A value in the arena, in the process that owns the arena."""

    block: Block
    """Holds the lease. Several values may lie in one block."""
    address: Address


class Encoded(NamedTuple):
    """A value in parts that can be written one after the other. The arrays in it have not been copied."""

    parts: list[Any]
    """Buffers: the value without its arrays, and each array."""
    num_bytes: int
    """Bytes that it takes in the arena."""


def encode(value: Any) -> Encoded:
    """Returns a value in parts. Arrays that are contiguous are not copied."""
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    parts = [header, *(buffer.raw() for buffer in buffers)]
    return Encoded(parts, sum(_aligned(len(part)) for part in parts))


class Mapping:
    """The arena, as a process that writes to it and reads from it maps it."""

    def __init__(self, file: int) -> None:
        """Maps the arena whose file descriptor this is. The descriptor may be closed afterwards."""
        self._memory = mmap.mmap(file, 0)
        self._bytes = memoryview(self._memory)
        self._read_only = self._bytes.toreadonly()

    def write(self, encoded: Encoded, offset: int) -> Address:
        """Writes a value, which must fit, and returns where it lies."""
        position, lengths = offset, []
        for part in encoded.parts:
            length = len(part)
            self._bytes[position : position + length] = part
            position += _aligned(length)
            lengths.append(length)
        return Address(offset, tuple(lengths))

    def read(self, address: Address) -> Any:
        """Returns a value. Its arrays lie in the arena, are read-only, and are valid as long as the block is leased."""
        header, *buffers = self._parts(address)
        return pickle.loads(header, buffers=buffers)

    def _parts(self, address: Address) -> list[memoryview]:
        parts, position = [], address.offset
        for length in address.lengths:
            if position + length > len(self._bytes):
                raise ValueError(f"a value must lie in the arena of {len(self._bytes)} bytes, got {address}")
            parts.append(self._read_only[position : position + length])
            position += _aligned(length)
        return parts


class Arena(Mapping):
    """The memory itself, in the process that owns it."""

    LARGE_BYTES = 64_000_000
    """Blocks of at least this size are given back to the system when their lease ends. The others keep their pages,
    because making the system provide them again takes longer than writing to them."""

    def __init__(self, capacity: int | None = None) -> None:
        """Reserves the memory. The system provides each page once something is written to it.

        Args:
          capacity: bytes; None for as many as this machine has.

        Raises:
          OSError: if the system has no such memory, or a policy forbids it.
        """
        self._capacity = capacity or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.file = os.memfd_create("qfleet")
        try:
            os.ftruncate(self.file, self._capacity)
            super().__init__(self.file)
        except OSError:
            os.close(self.file)
            raise
        self._end = 0
        self._free: dict[int, list[int]] = {}
        """Offsets of the blocks of each capacity that are not leased."""

    def lease(self, num_bytes: int) -> Block:
        """Leases a block. The one that was given back last comes first, so that a run touches as few pages as it can.

        Raises:
          RunFailed: if the memory is full.
        """
        capacity = _capacity_for(num_bytes)
        if free := self._free.setdefault(capacity, []):
            return Block(self, free.pop(), capacity)
        if self._end + capacity > self._capacity:
            raise RunFailed(
                f"what is on its way between the processes of a run must fit in the memory of this machine, got "
                f"{num_bytes:,} bytes more than {self._end:,} of {self._capacity:,}; give fewer processes, or a "
                f"smaller batch or network"
            )
        self._end += capacity
        return Block(self, self._end - capacity, capacity)

    def put(self, value: Any) -> Stored:
        """Writes a value of this process to a new block."""
        encoded = encode(value)
        block = self.lease(encoded.num_bytes)
        return Stored(block, self.write(encoded, block.offset))

    def take_back(self, offset: int, capacity: int) -> None:
        """Ends the lease of a block. Any thread may call it."""
        if capacity >= self.LARGE_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE, offset, capacity)
        self._free[capacity].append(offset)

    def close(self) -> None:
        """Closes the file. The memory is free once all processes that have mapped it have ended."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def can_share() -> bool:
    """Returns whether this system has such memory. Linux does, unless a policy forbids it."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        Arena(_PAGE).close()
    except OSError:
        return False
    return True


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _capacity_for(num_bytes: int) -> int:
    """Returns the capacity of the block for so many bytes: a few sizes only, so that blocks are used again."""
    step = max(_PAGE, 1 << max(0, (num_bytes - 1).bit_length() - 3))  # an eighth of the next power of two
    return -(-max(1, num_bytes) // step) * step
