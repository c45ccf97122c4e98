"""The end of a program that has left no loop over its run: the run's iterator is closed while that can still save."""

import threading
from collections.abc import Generator, Iterator

import pytest

from qfleet.training import leaving
from qfleet.training.leaving import close_open_iterators, closed_at_exit


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The functions that the end of the main thread would call."""
    found: list[object] = []
    monkeypatch.setattr(leaving, "call_before_threads_end", found.append)
    leaving._watch_the_end.cache_clear()
    yield found
    leaving._watch_the_end.cache_clear()


def run(closed: list[str], name: str, error: Exception | None = None) -> Generator[int, None, None]:
    try:
        yield 1
        yield 2
    finally:
        closed.append(name)
        if error:
            raise error


def test_what_is_still_open_at_the_end_is_closed(watched: list[object], caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []
    iterators = [closed_at_exit(run(closed, "first", ValueError("full"))), closed_at_exit(run(closed, "second"))]
    for iterator in iterators:
        next(iterator)
    assert watched == [close_open_iterators]
    close_open_iterators()
    assert sorted(closed) == ["first", "second"]
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "the end of a run failed: ValueError: full"
    ]


def test_the_loop_of_another_thread_outlasts_the_main_one(watched: list[object]) -> None:
    closed: list[str] = []
    iterators: list[Iterator[int]] = []

    def begin() -> None:
        iterators.append(closed_at_exit(run(closed, "other")))
        next(iterators[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    close_open_iterators()
    assert closed == watched == []
    assert list(iterators[0]) == [2]
