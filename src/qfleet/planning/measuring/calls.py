"""Calls the processes of a run on Ray one after the other, without Ray, and reads off what each call has cost.

The calls go through the same channel as in a run. Between two calls of one process the others work, so that its caches
are as cold as in a run. Nothing is decided here and nothing overlaps: that is the simulation's part.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qfleet.config import RayTopologyConfig, TrainConfig
from qfleet.config.lane_options import num_cores
from qfleet.config.python_path import module_folder_variables
from qfleet.planning.costs import COLD, Cost, cost_of
from qfleet.planning.measuring.children import Children, children
from qfleet.planning.measuring.served_process import Meter, ServedSpec, TimedCall
from qfleet.topologies.fleet.calls import Inbox
from qfleet.topologies.fleet.channel import Switchboard, Welcome
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.remote_process import RemoteProcess
from qfleet.topologies.fleet.supervisor import Supervisor

_SILENCE_SECONDS = 60.0
_BATCH = 8
"""Calls that are made at once, to find what one call costs beside what a turn of the director costs."""

_NUM_TURNS = 30
_NUM_WAKES = 50
_IDLE_SECONDS = 1e-3
"""Time after which a core counts as idle."""

_FEWEST_CALLS = 4
"""Calls of one kind without which their cost isn't known. The first of them compiles, and doesn't count."""


class _Handle:
    """Stands in for Ray's handle of a process: it is started when it is told where to connect."""

    def __init__(self, started: Children, spec: ServedSpec) -> None:
        self._children, self._spec, self.serve = started, spec, self

    def remote(self, welcome: Welcome) -> "_Handle":
        environment = {**os.environ, **module_folder_variables(), **self._spec.variables}
        self._children.start(
            "qfleet.planning.measuring.served_process", self._spec._replace(welcome=welcome), environment
        )
        return self

    def future(self) -> concurrent.futures.Future:
        return concurrent.futures.Future()


class ServedProcess(RemoteProcess[Any]):
    """A place in the run whose process is started without Ray."""

    def __init__(self, started: Children, name: str, kind: type, arguments: tuple, variables: dict[str, str]) -> None:
        super().__init__(name, kind, arguments, {}, variables, lambda: None, inherits=True)
        self._children, self._variables = started, variables

    @property
    def has_one_thread(self) -> bool:
        """Whether it computes with one thread."""
        return self._variables.get("PJRT_NPROC") == "1"

    def _launch(self) -> _Handle:
        return _Handle(self._children, ServedSpec(self._kind, self._arguments[1:], self._variables, None))

    def _kill(self, *, is_alive: bool) -> None:
        """Leaves it to the end of all of them."""


class Caller:
    """Calls processes, one call at a time."""

    def __init__(self, started: Children, config: TrainConfig) -> None:
        """Has no processes yet; `config` is that of the run."""
        self._children, self._checked_at = started, time.monotonic()
        topology = config.topology_as(RayTopologyConfig)
        self._waits_for_nothing = topology.lane_options.num_env_workers == 0
        """Whether a process with one thread has nothing to wait for but a core."""
        self._supervisor, inbox = Supervisor(_SILENCE_SECONDS, 0), Inbox()
        self._supervisor.open(inbox, Switchboard(inbox, str))
        self._labels: dict[ServedProcess, list[str]] = collections.defaultdict(list)
        self._bytes: dict[str, int] = {}
        self._suffix = ""
        self.close = self._supervisor.terminate
        """Ends all connections."""

    def start(self, name: str, kind: type, arguments: tuple, variables: dict[str, str]) -> ServedProcess:
        """Starts a process."""
        process = ServedProcess(self._children, name, kind, arguments, variables)
        self._supervisor.add(process)
        return process

    def measure(self, rounds: Callable[[], None], num_processes: int) -> None:
        """Has calls made, and made again while other processes keep the cores busy, if the run has more than cores.

        What is called then costs more, because its caches are cold: its label says so.

        Args:
          rounds: makes the calls.
          num_processes: of the run, with this one.
        """
        rounds()
        if num_processes > num_cores():
            for _ in range(num_cores()):
                self._children.start("qfleet.planning.measuring.load", None, os.environ)
            self._suffix = COLD
            rounds()

    def call(
        self,
        process: ServedProcess,
        label: str,
        method: Callable[..., Any],
        *arguments: Any,
        results: Sequence[Reference[Any]] = (),
    ) -> Any:
        """Calls a method, waits for its reply, and returns it. The label says which cost it counts to."""
        label = label.removesuffix(self._suffix) + self._suffix
        self._labels[process].append(label)
        reply = self._reply(process, method, *arguments, results=results)
        self._bytes[label] = sum(result.place.address.num_bytes for result in results)
        return reply

    def _reply(self, process: ServedProcess, method: Callable[..., Any], *arguments: Any, results: Any = ()) -> Any:
        replies: list[Any] = []
        self._supervisor.submit(process, method, *arguments, on_reply=replies.append, results=results)
        self._wait_for(replies, 1)
        return replies[0]

    def _wait_for(self, replies: list[Any], number: int) -> None:
        while len(replies) < number:
            self._supervisor.wait(0.1)
            self._supervisor.process_replies()
            if time.monotonic() - self._checked_at > 1.0:
                self._children.check_alive()  # a process that ends before it has connected is not heard of
                self._checked_at = time.monotonic()

    def costs(self) -> dict[str, Cost]:
        """Returns the cost of each label, and the memory of each process as that of a part named after it."""
        found: dict[str, Cost] = {}
        for process, labels in self._labels.items():
            calls, memory = self._reply(process, Meter.calls)
            of_process = self._costs_of([TimedCall(*each) for each in calls], labels)
            if process.has_one_thread:
                of_process = {label: self._of_one_thread(cost) for label, cost in of_process.items()}
            found |= of_process
            found[f"memory of {process.name}"] = Cost(0.0, num_bytes=memory)
        return found

    def _of_one_thread(self, cost: Cost) -> Cost:
        return dataclasses.replace(cost, width=1.0, wait_seconds=0.0 if self._waits_for_nothing else cost.wait_seconds)

    def _costs_of(self, calls: list[TimedCall], labels: list[str]) -> dict[str, Cost]:
        work, wall = collections.defaultdict(list), collections.defaultdict(list)
        aside = collections.defaultdict(list)  # what the reply takes, and the reading of the next call
        for label, call, following in zip(labels, calls, calls[1:], strict=False):
            work[label].append(call.ended[0] - call.began[0])
            wall[label].append(call.ended[1] - call.began[1])
            aside[label].append(following.began[0] - call.ended[0])
        found = {}
        for label, each in work.items():
            if len(each) >= _FEWEST_CALLS:
                of_method = cost_of(each[1:], wall[label][1:], self._bytes[label])
                found[label] = of_method.plus(cost_of(aside[label][1:], aside[label][1:]))
        return found

    def wake_cost(self, process: ServedProcess) -> Cost:
        """Returns the time between a message and the moment when its reader reads it, if the reader's core was idle."""
        waited = []
        for _ in range(_NUM_WAKES):
            before = self._reply(process, Meter.cpu_seconds)
            time.sleep(_IDLE_SECONDS)
            began, here = time.perf_counter(), time.thread_time()
            after = self._reply(process, Meter.work, _IDLE_SECONDS)
            waited.append(time.perf_counter() - began - (time.thread_time() - here) - (after - before))
        return Cost(0.0, wait_seconds=max(0.0, statistics.median(waited)) / 2)

    def direct(
        self, process: ServedProcess, work_between: Callable[[], None], decide: Callable[[], float]
    ) -> dict[str, Cost]:
        """Returns what the director's own part costs: of a turn, of its decisions, and of each call and its reply.

        Args:
          process: to call.
          work_between: makes the caches cold between two turns.
          decide: has a state machine decide what is due in one turn, and returns the CPU seconds that this took.
        """
        alone, many, decisions = list[float](), list[float](), list[float]()
        for _ in range(_NUM_TURNS):
            for number, found in ((1, alone), (_BATCH, many)):
                work_between()
                decisions.append(decide())
                began = time.thread_time()
                replies: list[Any] = []
                for _ in range(number):
                    self._supervisor.submit(process, Meter.nothing, on_reply=replies.append)
                self._wait_for(replies, number)
                found.append(time.thread_time() - began)
        one, several = cost_of(alone, alone), cost_of(many, many)
        per_call = max(1e-6, (several.cpu_seconds - one.cpu_seconds) / (_BATCH - 1))
        return {
            "call": Cost(per_call),
            "turn": Cost(max(1e-6, one.cpu_seconds - per_call)),
            "decide": Cost(sum(decisions) / len(decisions)),
        }


@contextlib.contextmanager
def caller(config: TrainConfig) -> Iterator[Caller]:
    """Yields a caller of the processes of a run, none of which is left afterwards."""
    with children() as started:
        calling = Caller(started, config)
        try:
            yield calling
        finally:
            calling.close()
