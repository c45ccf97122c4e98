"""What the process knows of itself."""

import subprocess
import sys
import time

import pytest

from qfleet.runtime.process import peak_rss_bytes, seconds_since_process_start


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
    before = seconds_since_process_start()
    time.sleep(0.1)
    assert seconds_since_process_start() - before == pytest.approx(0.1, abs=0.05)


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
