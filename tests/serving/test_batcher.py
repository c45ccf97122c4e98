"""The batcher and the sessions: who is answered together, in which order, and who is told to come back."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from qfleet.serving.batcher import Batcher, Overloaded
from qfleet.serving.engine import Actions, Question, Sessions, UnknownSession
from qfleet.serving.limits import Rate


class SlowEngine:
    """Answers a batch once the gate is open, with each observation's first number."""

    def __init__(self) -> None:
        self.is_asked, self.gate, self.batches = threading.Event(), threading.Event(), list[list[int]]()

    def act(self, questions: Sequence[Question]) -> list[Actions]:
        self.is_asked.set()
        assert self.gate.wait(60)
        self.batches.append([len(question.obs) for question in questions])
        return [Actions(question.obs[:, 0], question.obs, "mine") for question in questions]


def question(*numbers: float, sessions: tuple[str, ...] = ()) -> Question:
    return Question(np.array(numbers)[:, None], sessions, np.ones(len(numbers), bool) if sessions else None)


def answered(questions: Sequence[Question], max_waiting: int = 100) -> tuple[list[list[int]], list]:
    """Returns the sizes in each batch and the answers, if all but the first come while the first is answered."""

    async def ask() -> tuple[list[list[int]], list]:
        engine = SlowEngine()
        batcher = Batcher(engine, max_batch=4, max_delay_seconds=0.0, max_waiting=max_waiting)  # type: ignore[arg-type]
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.ask(questions[0]))
        while not engine.is_asked.is_set():
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.ask(each)) for each in questions[1:]]
        await asyncio.sleep(0)
        engine.gate.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return engine.batches, answers

    return asyncio.run(ask())


def test_what_arrives_while_a_batch_is_answered_makes_the_next_one():
    batches, answers = answered([question(0), question(1), question(2, 3), question(4), question(5)])
    assert batches[0] == [1], "nobody waits for others without a delay"
    assert batches[1:] == [[1, 2, 1], [1]], "as many as fit, in the order of arrival"
    assert [each.actions.tolist() for each in answers] == [[0], [1], [2, 3], [4], [5]]


def test_a_session_is_never_in_a_batch_twice():
    batches, _ = answered([question(0), *(question(i, sessions=("a",)) for i in range(3)), question(9)])
    assert batches == [[1], [1], [1], [1, 1]]


def test_too_many_are_told_to_come_back():
    _, answers = answered([question(0), question(1, 2), question(3, 4)], max_waiting=3)
    assert [isinstance(each, Overloaded) for each in answers] == [False, False, True]


def test_a_question_waits_for_others_for_a_while_at_most():
    async def ask() -> list[list[int]]:
        engine = SlowEngine()
        engine.gate.set()
        batcher = Batcher(engine, max_batch=2, max_delay_seconds=60.0, max_waiting=100)  # type: ignore[arg-type]
        running = asyncio.create_task(batcher.run())
        await asyncio.gather(batcher.ask(question(1)), batcher.ask(question(2)))  # the second fills the batch
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return engine.batches

    assert asyncio.run(ask()) == [[1, 1]]


def test_an_error_of_the_policy_fails_its_requests_and_the_server_goes_on():
    class Fails(SlowEngine):
        def act(self, questions: Sequence[Question]) -> list[Actions]:
            if questions[0].obs[0, 0] < 0:
                raise FloatingPointError("negative")
            return super().act(questions)

    async def ask() -> None:
        engine = Fails()
        engine.gate.set()
        batcher = Batcher(engine, max_batch=2, max_delay_seconds=0.0, max_waiting=100)  # type: ignore[arg-type]
        running = asyncio.create_task(batcher.run())
        with pytest.raises(FloatingPointError):
            await batcher.ask(question(-1))
        assert (await batcher.ask(question(7))).actions.tolist() == [7]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(ask())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_session_keeps_its_row_until_it_ends_or_makes_room():
    clock = Clock()
    sessions = Sessions(2, idle_seconds=10.0, clock=clock)
    a, b = sessions.slots(["a", "b"], [True, True]).tolist()
    assert a != b and sessions.slots(["b", "a"], [False, True]).tolist() == [b, a]
    with pytest.raises(UnknownSession, match="room for a session that begins, got 2 of 2"):
        sessions.slots(["c"], [True])
    with pytest.raises(UnknownSession, match="session 'c' isn't known"):
        sessions.slots(["a", "c"], [False, False])
    clock.now = 8.0
    assert sessions.slots(["a"], [False]).tolist() == [a]
    clock.now = 11.0
    assert sessions.slots(["c"], [True]).tolist() == [b], "b has been silent for too long"
    with pytest.raises(UnknownSession):
        sessions.slots(["b"], [False])
    assert sessions.forget("a") and not sessions.forget("a")
    assert sessions.slots(["d"], [True]).tolist() == [a] and len(sessions) == 2


def test_a_rate_is_kept_on_average_and_a_second_s_worth_may_come_at_once():
    clock = Clock()
    rate = Rate(10.0, clock)
    assert rate.take(10) == 0.0
    assert rate.take(1) == pytest.approx(0.1)
    clock.now = 1.0
    assert rate.take(15) == 0.0, "more than are left, if there are any"
    assert rate.take(1) == pytest.approx(0.5)
    clock.now = 1.6
    assert rate.take(1) == 0.0
    assert Rate(None).take(10**9) == 0.0
