"""Signals: the first one asks, the second one ends the process."""

import signal
import subprocess
import sys
import threading

import pytest

from qfleet.runtime import signals
from qfleet.runtime.signals import StopFlag, StopRequested, interrupts_held_back

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_sets_the_flag_and_the_old_handler_returns(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (*STOPS, signal.SIGUSR1)}
    with StopFlag() as flag:
        assert not flag.requested
        signal.raise_signal(number)
        assert flag.requested
    assert {each: signal.getsignal(each) for each in before} == before
    assert flag.requested, "the flag outlives the context"


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGHUP)])
def test_a_second_signal_ends_the_process_at_once(first: signal.Signals, second: signal.Signals) -> None:
    code = """
import hashlib, time
from qfleet.runtime import signals
signals.SAME_REQUEST_SECONDS = 0.0
with signals.StopFlag(ends_process=True) as flag:
    print("ready", flush=True)
    while not flag.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # compiled code that doesn't return to Python for long
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


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_a_process_that_has_done_its_work_leaves_its_exit_code(number: signal.Signals) -> None:
    """Both after the context and once the interpreter closes, when Python's own handlers are gone."""
    code = f"""
import os, sys
from qfleet.runtime.signals import StopFlag
class Last:
    def __init__(self, kill, pid):
        self.kill, self.pid = kill, pid
    def __del__(self):
        self.kill(self.pid, {number})
with StopFlag(ends_process=True):
    pass
os.kill(os.getpid(), {number})
sys.modules["kept until the end"] = Last(os.kill, os.getpid())
print("done", flush=True)
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\n", "")


@pytest.mark.parametrize("interrupts", [True, False])
def test_a_command_whose_work_was_interrupted_ends_without_closing_python(interrupts: bool) -> None:
    """XLA may still compile in its own threads, which crash once Python's end has destroyed what they use."""
    code = f"""
import atexit, contextlib, signal, sys
from qfleet.cli import main
from qfleet.runtime.signals import StopFlag, StopRequested
def run(command, rest):
    with StopFlag() as stop, contextlib.suppress(StopRequested):
        with stop.interrupting() if {interrupts} else contextlib.nullcontext():
            signal.raise_signal(signal.SIGTERM)
    return 0
main._run = run
sys.argv = ["qfleet", "train"]
atexit.register(print, "Python has closed")
sys.exit(main.main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == ("" if interrupts else "Python has closed\n")


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


def test_a_second_signal_raises_where_the_process_must_survive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert flag.requested


def test_signals_in_quick_succession_are_one_request() -> None:
    """`timeout` sends SIGTERM twice, systemd sends SIGHUP right after SIGTERM."""
    with StopFlag() as flag:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert flag.requested


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            signal.raise_signal(signal.SIGHUP)
            assert not flag.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_interrupts_only_what_may_be_left_half_done() -> None:
    reached = []
    with StopFlag() as flag:
        with pytest.raises(StopRequested), flag.interrupting():
            reached.append("before")
            signal.raise_signal(signal.SIGTERM)
            reached.append("after")
        with pytest.raises(StopRequested), flag.interrupting():
            reached.append("although it was requested earlier")
    assert reached == ["before"]


def test_a_request_to_save_is_taken_once_and_stops_nothing() -> None:
    with StopFlag() as flag, flag.interrupting():
        signal.raise_signal(signal.SIGUSR1)
        assert [flag.take_save_request(), flag.take_save_request(), flag.requested] == [True, False, False]


def test_a_context_shares_the_requests_of_the_one_around_it() -> None:
    with StopFlag() as outer:
        with StopFlag() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.requested
        assert outer.requested
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "the outer one still listens"
        with StopFlag() as later:
            assert later.requested, "a request that came between two contexts isn't lost"


def test_a_context_that_outlasts_the_first_one_still_hears_signals() -> None:
    """Two runs that are iterated over in turn have such contexts."""
    before = {each: signal.getsignal(each) for each in STOPS}
    first, second = StopFlag(), StopFlag()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    signal.raise_signal(signal.SIGTERM)
    assert second.requested
    second.__exit__(None, None, None)
    assert {each: signal.getsignal(each) for each in before} == before


def test_an_interrupt_that_is_held_back_comes_afterwards() -> None:
    before, done = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done and signal.getsignal(signal.SIGINT) is before
