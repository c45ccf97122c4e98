"""Gloo's thread keeps a core busy while it waits for a lock. Seen in jaxlib 0.10.2 on Linux.

JAX exchanges arrays between processes on CPUs through Gloo, which has a thread that receives. When a message arrives
while another thread of the process sends, the receiving thread asks again and again whether that one is done. If both
have the same core, as they do when each process has one core, the system takes the core from the sender for the
receiver. So the receiver waits for a thread that can't run, until the system's next tick: up to 4 ms for a message that
takes 0.1 ms.

Gloo has no setting for it. But in Linux a thread with the policy SCHED_BATCH doesn't take a core from another thread
when it wakes up, and a thread has the policy of the one that started it. JAX has no function that only starts Gloo, so
this module changes a private one.
"""

import functools
import os
from typing import Any


def keep_from_interrupting() -> None:
    """Makes the thread that Gloo starts leave a core to the thread that has it. Call this before JAX is used."""
    if not hasattr(os, "SCHED_BATCH"):  # only Linux has it
        return
    from jax._src import xla_bridge

    library = xla_bridge._jax  # type: ignore[attr-defined]
    start = library.make_gloo_tcp_collectives

    @functools.wraps(start)
    def start_as_batch(*arguments: Any, **settings: Any) -> Any:
        policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        try:
            return start(*arguments, **settings)
        finally:
            os.sched_setscheduler(0, policy, priority)

    library.make_gloo_tcp_collectives = start_as_batch
