"""Records on their way to another process."""

import numpy as np
import pytest

from qfleet.topologies.parameter_server.shared_memory import Buffer


def test_references_in_a_record_become_arguments_and_their_values_come_back_in_their_places(monkeypatch):
    pytest.importorskip("ray")
    from qfleet.topologies.parameter_server import remote

    class Reference:
        pass

    monkeypatch.setattr(remote, "is_reference", lambda value: isinstance(value, Reference))
    a, b, other = Reference(), Reference(), Reference()
    buffers = [Buffer(0, 3, "float32"), Buffer(64, 2, "float32")]
    record = remote.GradientRequest(remote.Pull(7, (a, b), (b,)), 0.5, buffers, (np.arange(2),), ())
    packed, *references = remote.pack(record, (other, a))
    assert references == [a, b, other], "each once, and those that nobody reads at the end"
    values = [np.zeros(3), np.ones(2), 0.25]
    unpacked = remote.unpack(packed, values)
    assert unpacked.pull.version == 7 and unpacked.buffers == buffers and unpacked.importance_exponent == 0.5
    assert unpacked.pull.params[0] is values[0] and unpacked.pull.params[1] is values[1]
    assert unpacked.pull.target_params[0] is values[1]
    np.testing.assert_array_equal(unpacked.places[0], [0, 1])
