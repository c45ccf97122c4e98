"""Memory that processes of one machine share: blocks, their leases, and the values in them."""

import gc
import os
from typing import NamedTuple

import numpy as np
import pytest

from qfleet.config import RunFailed
from qfleet.topologies.fleet.shared_memory import Address, Arena, Mapping, can_share, encode

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")


class Pair(NamedTuple):
    first: np.ndarray
    second: object


@pytest.fixture
def arena():
    arena = Arena(1 << 24)
    yield arena
    arena.close()


def test_a_value_is_read_as_it_was_written_and_its_arrays_are_aligned_and_read_only(arena):
    random = np.random.default_rng(0)
    value = Pair(random.normal(size=(3, 5)), {"empty": np.zeros((0, 4)), "turned": np.arange(6.0).reshape(2, 3).T})
    stored = arena.put(value)
    read = Mapping(arena.file).read(stored.address)
    np.testing.assert_array_equal(read.first, value.first)
    np.testing.assert_array_equal(read.second["turned"], value.second["turned"])
    assert read.second["empty"].shape == (0, 4)
    assert read.first.ctypes.data % 64 == 0 and not read.first.flags.writeable


def test_an_array_is_read_without_a_copy(arena):
    array = np.zeros(1000)
    stored = arena.put(array)
    reader = Mapping(arena.file)
    seen = reader.read(stored.address)
    arena.write(encode(np.ones(1000)), stored.block.offset)
    assert seen.sum() == 1000


def test_a_block_is_leased_again_only_once_nobody_refers_to_it(arena):
    stored, others = arena.put(np.zeros(100)), [arena.put(np.zeros(100)) for _ in range(3)]
    offset = stored.address.offset
    assert offset not in [other.address.offset for other in others]
    block = stored.block
    del stored
    assert arena.put(np.zeros(100)).address.offset != offset
    del block
    gc.collect()
    assert arena.put(np.zeros(100)).address.offset == offset


def test_blocks_never_overlap_whatever_is_leased_and_given_back(arena):
    random, held = np.random.default_rng(1), []
    for number in range(2_000):
        if held and random.random() < 0.5:
            held.pop(random.integers(len(held)))
        size = int(random.integers(1, 40_000))
        held.append((number, arena.put(np.full(size, number % 251, np.uint8))))
        if len(held) > 100:
            held = held[-50:]
    for number, stored in held:
        assert (arena.read(stored.address) == number % 251).all()


def test_memory_that_is_full_is_one_clear_error(arena):
    held = arena.put(np.zeros(1_500_000))
    with pytest.raises(RunFailed, match="must fit in the memory of this machine, got 12,0.* bytes more than"):
        arena.put(np.zeros(1_500_000))
    del held
    arena.put(np.zeros(1_500_000))


def test_an_address_outside_is_refused(arena):
    for address in (Address((1 << 24) - 10, (100,)), Address(0, (10, 1 << 30))):
        with pytest.raises(ValueError, match="must lie in the arena"):
            arena.read(address)


def test_large_blocks_are_given_back_to_the_system(arena):
    arena = Arena(1 << 30)
    before = os.fstat(arena.file).st_blocks
    stored = arena.put(np.ones(10_000_000))
    assert os.fstat(arena.file).st_blocks - before > 150_000  # of 512 bytes
    del stored
    gc.collect()
    assert os.fstat(arena.file).st_blocks - before < 1_000
    arena.close()
