"""Memory that processes share: where vectors are, and for how long."""

import gc
import itertools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.topologies.parameter_server.shared_memory import RegionMapping, SharedRegion, can_share

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory of this kind")


def test_it_can_be_shared_here_but_not_where_it_is_forbidden(monkeypatch):
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    assert can_share()
    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert not can_share()


def test_another_process_reads_and_writes_it():
    region = SharedRegion(2, [5, 4])
    lease = region.lease()
    buffers, mapping = region.buffers(lease, "float32"), RegionMapping(region.path)
    mapping.write(np.arange(5, dtype=np.float32), buffers[0])
    script = (
        "import sys, numpy as np; from qfleet.topologies.parameter_server.shared_memory import Buffer, RegionMapping;"
        f"mapping = RegionMapping(sys.argv[1]); buffers = [Buffer(*x) for x in {[tuple(x) for x in buffers]}];"
        "mapping.write(10 * mapping.read(buffers[0])[:4], buffers[1])"
    )
    subprocess.run([sys.executable, "-c", script, region.path], check=True, timeout=60)
    np.testing.assert_array_equal(mapping.read(buffers[1]), [0, 10, 20, 30])
    np.testing.assert_array_equal(mapping.read(buffers[0]), np.arange(5))
    path = region.path
    region.close()
    with pytest.raises(FileNotFoundError):
        RegionMapping(path)
    np.testing.assert_array_equal(mapping.read(buffers[0]), np.arange(5), "who has it open keeps it")


def test_a_slot_is_free_once_nothing_refers_to_it():
    region = SharedRegion(2, [3])
    first, second = region.lease(), region.lease()
    assert region.lease() is None
    number, also_first = second.number, first
    del first, second
    gc.collect()
    again = region.lease()
    assert again.number == number and region.lease() is None
    assert also_first.number != number
    region.close()


def test_pieces_of_all_slots_are_apart_and_aligned():
    region = SharedRegion(3, [17, 16, 17])
    leases = [region.lease() for _ in range(3)]
    buffers = sorted(buffer for lease in leases for buffer in region.buffers(lease, "float32"))
    for buffer, following in itertools.pairwise(buffers):
        assert buffer.offset + 4 * buffer.length <= following.offset
    assert all(buffer.offset % 64 == 0 for buffer in buffers)
    region.close()


def test_numbers_of_half_the_size():
    region = SharedRegion(1, [4])
    mapping, buffer = RegionMapping(region.path), region.buffers(region.lease(), "bfloat16")[0]
    mapping.write(np.asarray(jnp.arange(4, dtype=jnp.bfloat16)), buffer)
    assert mapping.read(buffer).dtype == jnp.bfloat16
    np.testing.assert_array_equal(mapping.read(buffer).astype(np.float32), np.arange(4))
    region.close()


def test_a_vector_that_comes_by_itself_is_taken_as_it_is():
    vector = np.arange(3.0)
    assert RegionMapping(None).read(vector) is vector
