"""Signals: the first one asks, the second one ends the process."""

import signal
import subprocess
import sys
import threading

import pytest

from qfleet.runtime.signals import StopFlag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_old_handler_returns(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with StopFlag() as flag:
        assert not flag.requested
        signal.raise_signal(number)
        assert flag.requested
    assert {each: signal.getsignal(each) for each in before} == before
    assert flag.requested, "the flag outlives the context"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(first: signal.Signals, second: signal.Signals) -> None:
    code = """
import time
from qfleet.runtime.signals import StopFlag
with StopFlag() as flag:
    print("ready", flush=True)
    while not flag.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    sum(range(10**12))  # compiled code that never returns to Python
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        try:
            assert child.stdout.readline() == "ready\n"
            child.send_signal(first)
            assert child.stdout.readline() == "asked\n"
            child.send_signal(second)
            assert child.wait() == -second
            assert child.stderr.read() == ""
        finally:
            child.kill()


def test_outside_the_main_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with StopFlag() as flag:
            seen.extend([flag.requested, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]
