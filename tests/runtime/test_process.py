"""Facts about the process: its age and its memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qfleet.runtime.process import available_memory_bytes, peak_rss_bytes, seconds_since_process_start


def run(code: str) -> float:
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the count starts at the import")
def test_age_counts_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.5); from qfleet.runtime import process; print(process.seconds_since_process_start())"
    )
    started = time.monotonic()
    age = run(code)
    assert 0.5 <= age <= time.monotonic() - started + 0.02


def test_age_grows_with_time() -> None:
    """By as much as another clock says, which is read before and after it on both sides."""
    earliest, before, early = time.monotonic(), seconds_since_process_start(), time.monotonic()
    while time.monotonic() < early + 0.1:
        pass
    late, after, latest = time.monotonic(), seconds_since_process_start(), time.monotonic()
    assert late - early - 1e-3 <= after - before <= latest - earliest + 1e-3


def test_peak_memory_remembers_what_was_freed() -> None:
    code = """
from qfleet.runtime.process import peak_rss_bytes
before = peak_rss_bytes()
block = b"x" * 300_000_000
del block
print(peak_rss_bytes() - before)
"""
    assert run(code) == pytest.approx(300e6, rel=0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is inherited")
def test_peak_memory_is_not_that_of_the_parent() -> None:
    block = b"x" * 300_000_000
    child = run("from qfleet.runtime import process; print(process.peak_rss_bytes())")
    assert child < 100e6 < len(block) <= peak_rss_bytes()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 4000 * 1024),
        # Version 2. The group has no limit of its own, but its parent has one. Cached files count as free.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
                "sys/fs/cgroup/a/memory.max": "1000000\n",
                "sys/fs/cgroup/a/memory.current": "700000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100000\n",
            },
            400_000,
        ),
        # Version 1 as a container sees it: the path is that of the host, but the limit is at the top.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 50000\n",
            },
            150_000,
        ),
        # The limit is higher than the available memory.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
                "sys/fs/cgroup/memory/memory.stat": "",
            },
            4000 * 1024,
        ),
    ],
)
def test_available_memory_is_what_the_kernel_or_a_control_group_leaves(
    files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    assert available_memory_bytes(write(tmp_path, files)) == expected
