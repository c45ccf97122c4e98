"""Memory that processes share: where vectors are, and for how long."""

import gc
import itertools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qfleet.topologies.shared_memory import SharedMemory, Window, can_share

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory of this kind")


def test_it_can_be_shared_here_but_not_where_it_is_forbidden(monkeypatch):
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    assert can_share()
    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert not can_share()


def test_another_process_reads_and_writes_it():
    memory = SharedMemory(2, [5, 4])
    slot = memory.slot()
    places, window = memory.places(slot, "float32"), Window(memory.path)
    window.put(np.arange(5, dtype=np.float32), places[0])
    script = (
        "import sys, numpy as np; from qfleet.topologies.shared_memory import Place, Window;"
        f"window = Window(sys.argv[1]); places = [Place(*place) for place in {[tuple(place) for place in places]}];"
        "window.put(10 * window.get(places[0])[:4], places[1])"
    )
    subprocess.run([sys.executable, "-c", script, memory.path], check=True)
    np.testing.assert_array_equal(window.get(places[1]), [0, 10, 20, 30])
    np.testing.assert_array_equal(window.get(places[0]), np.arange(5))
    path = memory.path
    memory.close()
    with pytest.raises(FileNotFoundError):
        Window(path)
    np.testing.assert_array_equal(window.get(places[0]), np.arange(5), "who has it open keeps it")


def test_a_slot_is_free_once_nothing_refers_to_it():
    memory = SharedMemory(2, [3])
    first, second = memory.slot(), memory.slot()
    assert memory.slot() is None
    number, also_first = second.number, first
    del first, second
    gc.collect()
    again = memory.slot()
    assert again.number == number and memory.slot() is None
    assert also_first.number != number
    memory.close()


def test_pieces_of_all_slots_are_apart_and_aligned():
    memory = SharedMemory(3, [17, 16, 17])
    slots = [memory.slot() for _ in range(3)]
    places = sorted(place for slot in slots for place in memory.places(slot, "float32"))
    for place, following in itertools.pairwise(places):
        assert place.offset + 4 * place.length <= following.offset
    assert all(place.offset % 64 == 0 for place in places)
    memory.close()


def test_numbers_of_half_the_size():
    memory = SharedMemory(1, [4])
    window, place = Window(memory.path), memory.places(memory.slot(), "bfloat16")[0]
    window.put(np.asarray(jnp.arange(4, dtype=jnp.bfloat16)), place)
    assert window.get(place).dtype == jnp.bfloat16
    np.testing.assert_array_equal(window.get(place).astype(np.float32), np.arange(4))
    memory.close()


def test_a_vector_that_comes_by_itself_is_taken_as_it_is():
    vector = np.arange(3.0)
    assert Window(None).get(vector) is vector
