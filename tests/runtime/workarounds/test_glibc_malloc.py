"""glibc's freed memory: it goes back to the system without the workaround, and stays with it."""

import os
import platform
import subprocess
import sys

import pytest

from qfleet.runtime.workarounds import glibc_malloc

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this switch")

MB = 10**6

MEASURE = """
import os, sys
import jax, jax.numpy as jnp
from qfleet.runtime.workarounds.glibc_malloc import reuse_freed_memory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

jax.config.update("jax_cpu_enable_async_dispatch", False)  # so that the temporaries are free when the call returns
if sys.argv[1] == "keep":
    reuse_freed_memory()
left, right = jnp.ones((3500, 8)), jnp.ones((8, 3500))
program = jax.jit(lambda left, right: jnp.tanh(left @ right) @ jnp.ones((3500, 8)))
compiled = program.lower(left, right).compile()
before = resident_bytes()
jax.block_until_ready(compiled(left, right))
print(compiled.memory_analysis().temp_size_in_bytes, resident_bytes() - before)
"""


def kept_bytes(mode: str) -> int:
    """Returns how much memory a process keeps after a program that needs 49 MB of temporaries has run once."""
    command = [sys.executable, "-c", MEASURE, mode]
    variables = os.environ | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120).stdout
    temporaries, kept = map(int, output.split())
    assert temporaries > 45 * MB, "the program must need temporaries, or this test shows nothing"
    return kept


def test_temporaries_still_go_back_to_the_system_unless_the_workaround_keeps_them() -> None:
    assert kept_bytes("keep") > 40 * MB, "the workaround no longer keeps freed memory"
    assert kept_bytes("default") < 20 * MB, (
        "this workaround may be no longer needed: the process kept the memory of XLA's temporaries without it; if this "
        f"is so in every supported version of jaxlib and glibc, delete {glibc_malloc.__file__}, its test and its calls"
    )
