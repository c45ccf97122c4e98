"""Gloo's thread: the workaround makes it leave the core to the sender, and touches no other thread."""

import os
import subprocess
import sys

import pytest

from qfleet.runtime.workarounds import gloo_thread

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has the policy")

START = """
import os, sys
import jax
from jax._src import xla_bridge
from qfleet.runtime.workarounds.gloo_thread import keep_from_interrupting

def policies():
    return {int(name): os.sched_getscheduler(int(name)) for name in os.listdir("/proc/self/task")}

library, started = xla_bridge._jax, {}
start = library.make_gloo_tcp_collectives

def watched(**settings):
    before = policies()
    collectives = start(**settings)
    started.update({thread: policy for thread, policy in policies().items() if thread not in before})
    return collectives

library.make_gloo_tcp_collectives = watched
if sys.argv[2] == "kept":
    keep_from_interrupting()
jax.distributed.initialize(sys.argv[1], 1, 0)
jax.devices()
others = [policy for thread, policy in policies().items() if thread not in started]
print(sorted(set(started.values())), sorted(set(others)))
jax.distributed.shutdown()
"""


@pytest.mark.parametrize("is_kept", [True, False])
def test_only_gloos_thread_gets_the_policy(is_kept: bool) -> None:
    from qfleet.topologies.all_reduce.processes import free_port

    command = [sys.executable, "-c", START, f"127.0.0.1:{free_port('127.0.0.1')}", "kept" if is_kept else "as it is"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    policy = os.SCHED_BATCH if is_kept else os.SCHED_OTHER
    assert done.stdout.splitlines()[-1] == f"[{policy}] [{os.SCHED_OTHER}]", (
        "this workaround may be no longer needed: Gloo starts no thread of its own, or not where it did; if this is so "
        f"in every supported version of jaxlib, delete {gloo_thread.__file__}, its test and its call"
    )
