"""Calls by sockets and shared memory, with processes that are real but that Ray knows nothing of."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qfleet.topologies.fleet import channel as channel_module
from qfleet.topologies.fleet.calls import Call, Failure, Inbox, Reply
from qfleet.topologies.fleet.channel import MethodRaised, Switchboard, Welcome, serve
from qfleet.topologies.fleet.references import Reference, dump, load
from qfleet.topologies.fleet.shared_memory import can_share

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")


class Target:
    """What runs in the process."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []

    def add(self, x: Any, y: int) -> Any:
        return x + y

    def make(self, size: int, number: int) -> tuple[int, Reference[np.ndarray]]:
        return size, Reference(np.full(size, number, np.float32))

    def make_two(self, first: int, second: int) -> list[Reference[np.ndarray]]:
        return [Reference(np.full(3, first)), Reference(np.full(4, second))]

    def total(self, array: Reference[np.ndarray]) -> float:
        return float(array.value.sum())

    def long(self, size: int) -> bytes:
        return bytes(size)

    def fail(self) -> None:
        raise KeyError("no such thing")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def run(welcome: Welcome) -> None:
    serve(Target(), welcome)


class Handle:
    """A process, with as much of Ray's interface as a switchboard uses."""

    def __init__(self, target: Any = None) -> None:
        self.serve, self._target = self, target or multiprocessing.get_context("spawn").Process

    def remote(self, welcome: Welcome) -> "Handle":
        self.process = self._target(target=run, args=(welcome,), daemon=True)
        self.process.start()
        return self

    def future(self) -> concurrent.futures.Future:
        return concurrent.futures.Future()  # Ray would say more about the end of the process


class Caller:
    """The director's side: makes calls and waits for what comes of them."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.board = Switchboard(self.inbox, str)
        self.heard: collections.deque = collections.deque()

    def connect(self, handle: Handle) -> Any:
        return self.board.connect(handle)

    def send(self, connection: Any, method: Any, *arguments: Any, num_references: int = 0) -> Call:
        data, references = dump(arguments)
        results = [Reference[Any]() for _ in range(num_references)]
        call = Call(method.__name__, data, references, results, print, print, is_repeated=False, since=0.0)
        connection.send(call)
        return call

    def hear(self) -> Any:
        """Returns the next reply, or the next failure."""
        while not self.heard:
            self.inbox.wait(60.0)
            self.heard += [news for _, news in self.inbox.take()]
        news = self.heard.popleft()
        if isinstance(news, Failure):
            return news
        assert isinstance(news, Reply)
        for reference, place in zip(news.call.results, news.places, strict=True):
            reference.place = place
        return load(news.data, news.call.results)

    def ask(self, connection: Any, method: Any, *arguments: Any, num_references: int = 0) -> Any:
        self.send(connection, method, *arguments, num_references=num_references)
        return self.hear()


@pytest.fixture
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    caller.board.close()
    caller.inbox.close()


@pytest.fixture
def in_thread(caller: Caller) -> Any:
    """A connection to a target in a thread of this process."""
    return caller.connect(Handle(threading.Thread))


def test_calls_are_carried_out_in_order_and_arrays_go_from_one_to_the_other(caller, in_thread):
    other = caller.connect(Handle(threading.Thread))
    assert caller.ask(in_thread, Target.add, 1, 2) == 3
    for size in (1_000, 200_000, 10, 3_000_000):  # more than the room that the reply before needed, and less
        made, array = caller.ask(in_thread, Target.make, size, 2, num_references=1)
        assert made == size and caller.ask(other, Target.total, array) == 2 * size
    for number in range(100):
        caller.send(in_thread, Target.add, number, 1)
    assert [caller.hear() for _ in range(100)] == list(range(1, 101))


def test_calls_that_wait_in_the_socket_are_kept_while_a_reply_asks_for_room(caller, in_thread):
    caller.send(in_thread, Target.make, 500_000, 1, num_references=1)
    for number in range(10):
        caller.send(in_thread, Target.add, number, 0)
    _, array = caller.hear()
    assert [caller.hear() for _ in range(10)] == list(range(10))
    assert caller.ask(in_thread, Target.total, array) == 500_000


def test_two_references_of_one_reply_share_a_block_which_is_free_once_both_are_gone(caller, in_thread):
    first, second = caller.ask(in_thread, Target.make_two, 5, 6, num_references=2)
    assert first.place.block is second.place.block
    assert caller.board.read(first.place).tolist() == [5] * 3 and caller.board.read(second.place).tolist() == [6] * 4
    offset = first.place.block.offset
    del first
    again, _ = caller.ask(in_thread, Target.make_two, 1, 1, num_references=2)
    assert again.place.block.offset != offset and caller.board.read(second.place).tolist() == [6] * 4


def test_what_this_process_has_made_is_written_once_for_all_readers(caller, in_thread):
    array = Reference(np.ones(50_000))
    assert caller.ask(in_thread, Target.total, array) == 50_000
    place = array.place
    assert caller.ask(in_thread, Target.total, array) == 50_000 and array.place is place


def test_arguments_and_replies_that_are_too_long_for_the_socket_go_through_memory(caller, in_thread):
    text = bytes(300_000)
    assert caller.ask(in_thread, Target.add, np.arange(100_000), 1)[-1] == 100_000
    assert caller.ask(in_thread, Target.long, 300_000) == text
    assert caller.ask(in_thread, Target.long, 70_000) == text[:70_000]


def test_an_error_comes_back_with_its_traceback_and_the_process_goes_on(caller, in_thread):
    failure = caller.ask(in_thread, Target.fail)
    assert failure.call.method == "fail" and failure.cause == "raised KeyError: 'no such thing'"
    assert isinstance(failure.error, MethodRaised) and "in fail" in str(failure.error) and failure.is_alive
    assert caller.ask(in_thread, Target.add, 1, 1) == 2


def test_a_process_that_does_not_read_holds_nobody_up(caller, in_thread):
    calls = 3_000
    for number in range(calls):  # more than fits in a socket
        caller.send(in_thread, Target.add, bytes(1_000), bytes([number % 251]))
    assert [caller.hear()[-1] for _ in range(calls)] == [number % 251 for number in range(calls)]


def test_the_end_of_a_process_is_heard_and_its_blocks_are_free_only_then(caller):
    handle = Handle()
    connection = caller.connect(handle)
    caller.ask(connection, Target.make, 1_000, 1, num_references=1)
    os.kill(handle.process.pid, signal.SIGSTOP)
    call = caller.send(connection, Target.make, 1_000, 2, num_references=1)
    (sent,) = connection._in_flight
    assert sent.call is call
    offset = sent.room.offset
    del sent
    connection.close()  # as when a silent process is replaced
    assert caller.board.arena.lease(4_000).offset != offset, "it may still write there"
    handle.process.kill()
    while connection._in_flight:
        caller.inbox.wait(60.0)
    assert not caller.inbox.take()
    handle.process.join()


def test_a_process_that_is_killed_while_it_works_is_reported_once(caller):
    connection = caller.connect(Handle())
    caller.ask(connection, Target.add, 1, 1)
    caller.send(connection, Target.die)
    caller.send(connection, Target.add, 1, 1)
    failure = caller.hear()
    assert failure == Failure(None, "died") and not caller.heard
    caller.inbox.wait(0.0)
    assert not caller.inbox.take()


def test_a_process_ends_its_work_when_the_director_is_gone(caller):
    handle = Handle()
    caller.ask(caller.connect(handle), Target.add, 1, 1)
    caller.board.close()
    handle.process.join(60.0)
    assert handle.process.exitcode == 0
    caller.board = Switchboard(caller.inbox, str)


def answer_to(stranger: socket.socket, caller: Caller) -> bytes:
    """Returns what the switchboard sends to a socket."""
    stranger.setblocking(False)
    while True:
        caller.inbox.wait(0.01)
        with contextlib.suppress(BlockingIOError):
            return stranger.recv(100)


def test_strangers_are_not_heard(caller, in_thread):
    address = caller.board._socket.getsockname()
    numbers = iter(range(100))
    for words in (b"", b"x", pickle.dumps("hello"), bytes(32) + (0).to_bytes(8, "little"), bytes(5_000)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(address)
            stranger.send(words)
            assert caller.ask(in_thread, Target.add, next(numbers), 0) >= 0
            assert answer_to(stranger, caller) == b"", "the connection is closed, and no file was handed over"


def test_the_token_opens_a_connection_once_only(caller):
    welcomes = []

    class Keeps(Handle):
        def remote(self, welcome: Welcome) -> Handle:
            welcomes.append(welcome)
            return super().remote(welcome)

    connection = caller.connect(Keeps(threading.Thread))
    assert caller.ask(connection, Target.add, 1, 1) == 2
    again = threading.Thread(target=serve, args=(Target(), welcomes[0]))
    again.start()
    while again.is_alive():  # it isn't let in, and so returns
        caller.inbox.wait(0.01)
    assert caller.ask(connection, Target.add, 1, 1) == 2


def test_users_are_told_apart(caller, monkeypatch):
    monkeypatch.setattr(channel_module.os, "getuid", lambda: 12345)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(caller.board._socket.getsockname())
        assert answer_to(stranger, caller) == b""
