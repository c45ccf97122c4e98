"""Records with references, on their way to another process."""

import pickle

import numpy as np
import pytest

from qfleet.topologies.fleet.references import Reference, dump, load


def test_references_stay_behind_and_come_back_in_their_places():
    first, second = Reference(np.zeros(3)), Reference("two")
    record = (7, [first, {"again": first}], second)
    data, references = dump(record)
    assert references == [first, first, second] and b"two" not in data
    others = [Reference(number) for number in range(3)]
    number, (one, mapping), last = load(data, others)
    assert (number, one, mapping, last) == (7, others[0], {"again": others[1]}, others[2])


def test_a_value_is_read_when_it_is_first_asked_for_and_not_again():
    reads = []

    def read() -> int:
        reads.append(1)
        return 5

    reference = Reference(read=read)
    assert not reads and not reference.has_value
    assert reference.value == reference.value == 5 and len(reads) == 1


def test_a_copy_may_be_kept_and_changed():
    array = np.zeros(3)
    array.setflags(write=False)
    copied = Reference([array]).copy()[0]
    copied += 1
    assert array.tolist() == [0, 0, 0] and copied.tolist() == [1, 1, 1]


def test_a_reference_is_there_once_its_value_has_been_made():
    reference = Reference()
    assert not reference.is_there
    reference.place = "somewhere"
    assert reference.is_there and not reference.has_value
    assert Reference(0).is_there


def test_nothing_but_a_call_can_send_a_reference():
    with pytest.raises(TypeError, match="can only be an argument or a result of a remote call"):
        pickle.dumps([Reference(1)])
