"""Between two processes on CPUs, batches are dealt without an error in a bit."""

import os
import subprocess
import sys

import pytest

from qfleet.topologies.all_reduce.processes import free_port

ROUNDS, SHARE_BYTES = 100, 2**22

DEAL = f"""
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from qfleet.core.replicas import over_axis
from qfleet.runtime import peers

rounds, rows, columns = {ROUNDS}, 2 * 64, {SHARE_BYTES} // 64 // 4
peers.join(sys.argv[1], 2, rank := int(sys.argv[2]), 1, 60.0)
mesh = jax.make_mesh((2,), ("data",))
rng = np.random.default_rng(0)  # both have the same numbers
whole = rng.integers(2**32, size=(rows, columns), dtype=np.uint32)
is_mine = rng.integers(2, size=rows) == rank

def dealt(has_slow_messages):
    def deal(whole, is_mine):
        replicas = over_axis("data", 2, has_slow_messages=has_slow_messages)
        return replicas.deal(whole, is_mine.reshape(-1), ())[0]
    return jax.jit(jax.shard_map(deal, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False))

for way, deal in (("psum", dealt(True)), ("psum_scatter", dealt(False))):
    wrong = 0
    for i in range(rounds):
        sent = whole + np.uint32(i)
        mine = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, P("data")), is_mine)
        (share,) = deal(jax.make_array_from_process_local_data(jax.NamedSharding(mesh, P()), sent), mine
                        ).addressable_shards
        wrong += not np.array_equal(share.data, sent[share.index])
    print(way, wrong, flush=True)
peers.leave()
"""


@pytest.mark.slow
def test_every_share_is_right_and_whether_psum_scatter_would_be_is_on_record(record_property, capsys) -> None:
    """`psum_scatter` isn't used here: a development version of JAX 0.12 is reported to get wrong numbers from it.

    With JAX 0.10.2 none of 100 rounds was wrong. How many are, with the JAX that is installed, is printed and written
    into the JUnit report. Only what is used must be right.
    """
    command = [sys.executable, "-c", DEAL, f"127.0.0.1:{free_port('127.0.0.1')}"]
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1"}
    both = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=variables) for i in (0, 1)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0]
    wrong = [dict(line.split() for line in output.splitlines() if line.startswith("psum")) for output in outputs]
    assert [set(each) for each in wrong] == [{"psum", "psum_scatter"}] * 2
    record_property("wrong_rounds_of_psum_scatter", [int(each["psum_scatter"]) for each in wrong])
    with capsys.disabled():
        for rank, each in enumerate(wrong):
            print(f"\nprocess {rank}: psum_scatter was wrong in {each['psum_scatter']} of {ROUNDS} rounds")
    assert [int(each["psum"]) for each in wrong] == [0, 0]
