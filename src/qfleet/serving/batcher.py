"""Joins the observations of many requests into batches, and runs them one after the other in a thread."""

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from qfleet.serving.engine import Actions, Engine, Question, UnknownSession

T = TypeVar("T")


class Overloaded(Exception):
    """More observations wait than may."""


class _Waiting(NamedTuple):
    question: Question
    answer: "asyncio.Future[Actions]"
    arrived_at: float


class Batcher:
    """Answers questions in the order in which they came, several at once."""

    def __init__(self, engine: Engine, max_batch: int, max_delay_seconds: float, max_waiting: int) -> None:
        """Answers nothing until `run`.

        Args:
          engine: answers batches.
          max_batch: most observations in one batch.
          max_delay_seconds: longest time that a question waits for others to join it.
          max_waiting: most observations that may wait.
        """
        self.engine = engine
        """The policy that answers now."""
        self.on_batch: Callable[[int, float], None] = lambda num_observations, seconds: None
        """Called after each batch with its size, and the seconds that it took."""
        self._max_batch, self._max_delay_seconds, self._max_waiting = max_batch, max_delay_seconds, max_waiting
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self.num_waiting = 0
        """Observations that wait."""
        self._has_some, self._has_many = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "qfleet-policy")

    async def ask(self, question: Question) -> Actions:
        """Returns the actions for a question.

        Raises:
          Overloaded: if too many observations wait already.
          UnknownSession: if the question goes on with a session that isn't known, or there is no room for a new one.
        """
        size = len(question.obs)
        if self.num_waiting + size > self._max_waiting:
            raise Overloaded(
                f"at most {self._max_waiting} observations may wait, got {self.num_waiting} and {size} more"
            )
        answer: asyncio.Future[Actions] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(question, answer, time.monotonic()))
        self.num_waiting += size
        self._has_some.set()
        if self.num_waiting >= self._max_batch:
            self._has_many.set()
        return await answer

    async def run(self) -> None:
        """Answers questions until it is cancelled."""
        try:
            while True:
                await self._has_some.wait()
                await self._wait_for_others()
                await self._answer(self._take())
        finally:
            for waiting in self._waiting:
                waiting.answer.cancel()
            self._thread.shutdown(wait=False)

    async def replace(self, engine: Engine) -> None:
        """Lets another engine answer from the next batch on. It goes on with the sessions, as far as it can."""

        def take_over() -> None:
            engine.take_over(self.engine)
            self.engine = engine

        await self._in_thread(take_over)

    async def forget(self, session: str) -> bool:
        """Forgets a session, and returns whether it was known."""
        return await self._in_thread(lambda: self.engine.forget(session))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _wait_for_others(self) -> None:
        left = self._waiting[0].arrived_at + self._max_delay_seconds - time.monotonic()
        if left > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_many.wait(), left)

    def _take(self) -> list[_Waiting]:
        """Takes the questions of the next batch. The same session is never in it twice."""
        batch: list[_Waiting] = []
        size, sessions = 0, set[str]()
        while self._waiting:
            question = self._waiting[0].question
            if size + len(question.obs) > self._max_batch or not sessions.isdisjoint(question.sessions):
                break
            size += len(question.obs)
            sessions.update(question.sessions)
            batch.append(self._waiting.popleft())
        self.num_waiting -= size
        if not self._waiting:
            self._has_some.clear()
        if self.num_waiting < self._max_batch:
            self._has_many.clear()
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        questions = [waiting.question for waiting in batch]
        try:
            found: list[Actions | UnknownSession] = await self._in_thread(lambda: self.engine.act(questions))
        except Exception as error:  # the requests fail, and the server goes on
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        self.on_batch(sum(len(question.obs) for question in questions), time.monotonic() - started)
        for waiting, each in zip(batch, found, strict=True):
            if waiting.answer.done():  # whoever asked has gone
                continue
            if isinstance(each, UnknownSession):
                waiting.answer.set_exception(each)
            else:
                waiting.answer.set_result(each)
