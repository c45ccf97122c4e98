"""Drives a state machine without processes: it answers the requests, in any order that is possible.

Each process answers its requests in their order, once the arguments are there. The values are made by the test.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qfleet.topologies.fleet.messages import (
    CallRequest,
    CheckValues,
    Dropped,
    Event,
    LearnerFound,
    Lost,
    ProcessId,
    ReadLearner,
    ReadReplay,
    Ready,
    ReplayFound,
    Replied,
    SavedShare,
    Started,
    Turn,
    ValuesChecked,
    Warn,
)
from qfleet.topologies.fleet.references import Reference, dump
from qfleet.topologies.fleet.sharded_replay import Insert

NOT_SENT = {"results", "newest", "snapshot"}
"""Fields of requests that the director doesn't pass on."""


class DrivenMachine:
    """A machine, and the requests that nobody has answered yet."""

    def __init__(self, machine: Any, replies: Mapping[type, Callable[[Any], Any]], ready: Sequence[ProcessId]) -> None:
        """Starts it, and makes some processes ready.

        Args:
          machine: the machine; its stats are set.
          replies: for each type of request, a function that returns the reply; None is the reply to other requests.
          ready: the processes that are ready at once.
        """
        self.machine, self._replies = machine, replies
        self.waiting: dict[ProcessId, collections.deque[CallRequest]] = collections.defaultdict(collections.deque)
        """For each process, the requests that it has not answered."""
        self.warnings: list[str] = []
        self.learner = LearnerFound(0, None)
        """The learner of the newest checkpoint."""
        self.shares: dict[ProcessId, SavedShare] = {}
        """The shares of its replay."""
        self.log: list[Any] = []
        """All requests, in their order."""
        self.tell(Started())
        for process in ready:
            self.tell(Ready(process))

    def tell(self, event: Event) -> None:
        """Tells the machine, and does what it requests."""
        for request in self.machine.handle(event):
            self.log.append(request)
            match request:
                case Warn(text):
                    self.warnings.append(text)
                case ReadLearner():
                    self.tell(self.learner)
                case ReadReplay(process):
                    self.tell(ReplayFound(process, self.shares.get(process), 0))
                case CheckValues():
                    self.tell(ValuesChecked(is_lost=False))
                case CallRequest():
                    self.waiting[request.process].append(request)

    def turn(self) -> None:
        """Lets the machine request all that is due."""
        self.tell(Turn())

    def can_answer(self, process: ProcessId) -> bool:
        """Returns whether a process has a request whose arguments are there."""
        if not self.waiting[process]:
            return False
        request = self.waiting[process][0]
        arguments = [getattr(request, each.name) for each in dataclasses.fields(request) if each.name not in NOT_SENT]
        made = {result for requests in self.waiting.values() for request in requests for result in request.results}
        return not any(reference in made for reference in dump(arguments)[1])

    def answer(self, process: ProcessId) -> bool:
        """Has a process answer its first request; returns False if it can't."""
        if not self.can_answer(process):
            return False
        request = self.waiting[process].popleft()
        self.tell(Replied(request, self._replies.get(type(request), lambda _: None)(request)))
        return True

    def answer_all(self, *roles: str) -> None:
        """Has all processes of these roles answer all that they can."""
        is_any_answered = True
        while is_any_answered:
            is_any_answered = False
            for process in [process for process in self.waiting if process.role in roles]:
                is_any_answered |= self.answer(process)

    def lose(self, process: ProcessId, lost: tuple[Reference, ...] = ()) -> None:
        """Loses a process, and with it the requests that it had; its replacement is ready at once."""
        requests, self.waiting[process] = self.waiting[process], collections.deque()
        self.tell(Lost(process))
        for request in requests:
            if isinstance(request, Insert):
                self.waiting[process].append(request)
            else:
                self.tell(Dropped(request, lost))
        self.tell(Ready(process))

    def requested(self, *kinds: type) -> list[Any]:
        """Returns all requests of these kinds, in their order."""
        return [request for request in self.log if isinstance(request, kinds)]
