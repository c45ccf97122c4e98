"""Simulates the processes of a run on Ray. The state machine that directs the run directs the simulation, too.

The director takes all news at once, tells the machine, and sends what it requests; that takes CPU time on its node.
Each process carries out its requests in order, on the cores of its node, once their arguments have arrived there.
"""

import abc
import collections
import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from qfleet.planning.cluster import Cluster
from qfleet.planning.cores import Clock, Cores, Link
from qfleet.planning.costs import COLD, NOTHING, Cost, Costs
from qfleet.topologies.fleet.machine import Machine
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
    Request,
    Started,
    Turn,
    ValuesChecked,
    Warn,
)
from qfleet.topologies.fleet.references import Reference
from qfleet.topologies.fleet.sharded_replay import Insert

DIRECTOR = "director"
GIGABIT = 1e9 / 8


M = TypeVar("M", bound=Machine[Any])


class FleetModel(abc.ABC, Generic[M]):
    """What the simulation must know of one topology."""

    machine: M
    """Directs the run."""
    is_cold = False
    """Whether the process whose request is asked about begins after a pause, or shares its core."""

    def __init__(self, costs: Costs) -> None:
        """Knows what the parts cost."""
        self._costs = costs

    def cost_of(self, part: str) -> Cost:
        """Returns what a part costs now."""
        return self._costs.get(part + COLD * self.is_cold) or self._costs[part]

    @property
    @abc.abstractmethod
    def processes(self) -> Sequence[ProcessId]:
        """All processes, besides the director."""

    @abc.abstractmethod
    def cost(self, request: CallRequest[Any]) -> Cost:
        """Returns what a request costs the process that carries it out."""

    @abc.abstractmethod
    def arguments(self, request: CallRequest[Any]) -> Sequence[Reference[Any]]:
        """Returns the references that a process reads to carry out a request."""

    @abc.abstractmethod
    def reply(self, request: CallRequest[Any]) -> Any:
        """Returns what a process replies to a request that it has carried out."""

    @abc.abstractmethod
    def lose(self, process: ProcessId) -> None:
        """Forgets what a process held."""


class SimulatedProcess:
    """A process: it carries out requests one by one."""

    def __init__(self, process: ProcessId, node: int) -> None:
        """Has nothing to do."""
        self.id, self.node = process, node
        self.unsent: collections.deque[CallRequest[Any]] = collections.deque()
        """Requests that wait at the director until their arguments have been made."""
        self.waiting: collections.deque[CallRequest[Any]] = collections.deque()
        self.current: CallRequest[Any] | None = None
        self.incarnation = 0
        self.is_down = False
        """Whether it is lost, and its replacement isn't ready yet."""
        self.busy_seconds = 0.0
        """Time in which it had something to do, or waited for a core to do it on."""


class Fleet:
    """The processes of a run, the nodes they are on, and the director."""

    def __init__(self, model: FleetModel[Any], costs: Costs, cluster: Cluster, seed: int = 0) -> None:
        """Places all processes, which are ready at once.

        Args:
          model: of the topology.
          costs: of the parts.
          cluster: where the processes are.
          seed: of the times when processes are lost.

        Raises:
          ConfigError: if the cluster has no room for the processes.
        """
        self.model, self._costs, self.cluster = model, costs, cluster
        self.clock, self._random = Clock(), random.Random(seed)
        places = cluster.place([(DIRECTOR, -1), *((each.role, each.number) for each in model.processes)])
        self._node = places[DIRECTOR, -1]
        self.cores = [Cores(self.clock, group.cores, group.speed) for _, group in cluster.nodes()]
        self.links = [Link(group.gigabits_per_second * GIGABIT) for _, group in cluster.nodes()]
        self.processes = {each: SimulatedProcess(each, places[each.role, each.number]) for each in model.processes}
        self._share_cores = cluster.is_here and 1 + len(self.processes) > cluster.num_cores
        self._director_busy_seconds = 0.0
        self.decision_seconds, self.num_turns = 0.0, 0
        """Real CPU seconds that the machine took to decide, and in how many turns."""
        self.moved_bytes = self.wire_bytes = 0
        """Bytes of arrays that processes have read from others: all of them, and those of other nodes."""
        self.num_lost = 0
        self._copies: dict[Reference[Any], set[int]] = {}
        """Nodes that hold the value of each reference."""
        self._sizes: dict[Reference[Any], int] = {}
        self._blocked: dict[ProcessId, None] = {}
        """Processes with a request whose arguments have not been made."""
        self._unread: list[tuple[Event, float]] = []
        """What the director has not heard, each with the CPU seconds that it takes to hear it."""
        self._news: collections.deque[tuple[Event, float]] = collections.deque()
        """What it has heard and not dealt with."""
        self._is_directing, self._directs_since = False, 0.0
        # On this machine, calls go through a channel; in a cluster Ray carries all of them, also within a node.
        self._call = costs["call"].cpu_seconds if cluster.is_here else cluster.call_seconds
        self._wake = costs.get("wake", NOTHING).wait_seconds
        self._turn_seconds = costs["turn"].cpu_seconds + costs.get("decide", NOTHING).cpu_seconds
        self._tell(Started())
        for each in model.processes:
            self._hear(Ready(each))
            self._schedule_loss(self.processes[each])

    # --- The director ---

    @property
    def director_busy_seconds(self) -> float:
        """Simulated seconds for which the director has been at work, with the turn that it takes now."""
        return self._director_busy_seconds + self._is_directing * (self.clock.now - self._directs_since)

    def _hear(self, event: Event, call_seconds: float = 0.0) -> None:
        self._unread.append((event, call_seconds))
        self._direct()

    def _direct(self) -> None:
        """Takes all news, deals with them one by one, and then takes a turn."""
        if self._is_directing or not self._unread:
            return
        self._is_directing, self._directs_since = True, self.clock.now
        self.num_turns += 1
        self._news.extend(self._unread)
        self._unread.clear()
        self._deal_with_news()

    def _deal_with_news(self) -> None:
        while self._news and not self._news[0][1]:
            self._tell(self._news.popleft()[0])
        if self._news:
            event, call_seconds = self._news.popleft()

            def deal() -> None:
                self._tell(event)
                self._deal_with_news()

            self.cores[self._node].run(call_seconds, 1.0, deal)
        else:
            self.cores[self._node].run(self._turn_seconds, 1.0, self._take_turn)

    def _take_turn(self) -> None:
        self._tell(Turn())
        self._director_busy_seconds += self.clock.now - self._directs_since
        self._is_directing = False
        self._direct()

    def _tell(self, event: Event) -> None:
        """Tells the machine what has happened, and sends what it requests."""
        if isinstance(event, Replied):
            node = self.processes[event.request.process].node
            for reference in event.request.results:
                self._copies.setdefault(reference, set()).add(node)
        for request in self._requests(event):
            self.processes[request.process].unsent.append(request)
            self._blocked[request.process] = None
        for process in list(self._blocked):
            self._send(self.processes[process])

    def _requests(self, event: Event) -> list[CallRequest[Any]]:
        """Returns the calls that the machine requests when it is told of an event, and answers its other requests."""
        found: list[CallRequest[Any]] = []
        began = time.thread_time()
        requests = self.model.machine.handle(event)
        self.decision_seconds += time.thread_time() - began
        for request in requests:
            match request:
                case CallRequest():
                    found.append(request)
                case _:
                    found += [each for answer in self._answers(request) for each in self._requests(answer)]
        return found

    def _answers(self, request: Request) -> list[Event]:
        """Returns what the director itself answers: there is no checkpoint, and nothing that was made is lost."""
        match request:
            case ReadLearner():
                return [LearnerFound(self.model.machine.learner_steps, None)]
            case ReadReplay(process):
                return [ReplayFound(process, None, 0)]
            case CheckValues():
                return [ValuesChecked(is_lost=False)]
            case Warn():
                return []
        raise TypeError(f"the simulation can't answer {request}")

    def _send(self, process: SimulatedProcess) -> None:
        """Sends what waits at the director, up to the first request whose arguments have not been made."""
        while process.unsent and all(
            each in self._copies or each.has_value for each in self.model.arguments(process.unsent[0])
        ):
            process.waiting.append(process.unsent.popleft())
            incarnation = process.incarnation
            self.clock.after(self._latency(process), functools.partial(self._begin, process, incarnation))
        if process.unsent:
            self._blocked[process.id] = None
        else:
            self._blocked.pop(process.id, None)

    # --- Processes ---

    def _begin(self, process: SimulatedProcess, incarnation: int, *, goes_on: bool = False) -> None:
        """Has a process carry out the next request, if it has one and does nothing else.

        Args:
          process: the process.
          incarnation: its incarnation when this was planned.
          goes_on: whether it has carried out another one until now.
        """
        if process.incarnation != incarnation or process.is_down or process.current or not process.waiting:
            return
        request = process.current = process.waiting.popleft()
        self.model.is_cold = self._share_cores and (not goes_on or self.cores[process.node].are_busy)
        cost, began = self.model.cost(request), self.clock.now + self._fetch(process, self.model.arguments(request))

        def is_over() -> bool:
            return process.incarnation != incarnation

        def work() -> None:
            if not is_over():
                self.cores[process.node].run(max(cost.cpu_seconds, 1e-9), cost.width, wait)

        def wait() -> None:
            if not is_over():
                self.clock.after(cost.wait_seconds, end)

        def end() -> None:
            if is_over():
                return
            process.current = None
            process.busy_seconds += self.clock.now - began
            self._sizes.update(dict.fromkeys(request.results, cost.num_bytes // max(1, len(request.results))))
            self._reply(process, request)
            self._begin(process, incarnation, goes_on=True)

        self.clock.after(began - self.clock.now, work)

    def _reply(self, process: SimulatedProcess, request: CallRequest[Any]) -> None:
        replied = Replied(request, self.model.reply(request))
        self.clock.after(self._latency(process), lambda: self._hear(replied, self._call))

    def _latency(self, process: SimulatedProcess) -> float:
        """Returns the time of a message between a process and the director, until its reader is awake."""
        wake = 0.0 if self.cores[process.node].are_busy else self._wake
        return wake if process.node == self._node else wake + self.cluster.latency_seconds

    def _fetch(self, process: SimulatedProcess, references: Sequence[Reference[Any]]) -> float:
        """Returns the seconds until the values of references are on the node of a process."""
        seconds = 0.0
        for reference in references:
            size, copies = self._sizes.get(reference, 0), self._copies.get(reference)
            self.moved_bytes += size
            if copies is None or process.node in copies:
                continue
            source = min(copies, key=lambda node: self.links[node].sends_until)
            copies.add(process.node)
            self.wire_bytes += size
            taken = Link.transfer(
                self.clock, self.links[source], self.links[process.node], size, self.cluster.latency_seconds
            )
            seconds = max(seconds, taken)
        return seconds

    # --- Losses ---

    def _schedule_loss(self, process: SimulatedProcess) -> None:
        if rate := self.cluster.lost_per_process_hour / 3600:
            self.clock.after(self._random.expovariate(rate), lambda: self._lose(process))

    def _lose(self, process: SimulatedProcess) -> None:
        """Loses a process, with the requests that it had; another takes its place after a while."""
        self._schedule_loss(process)
        if process.is_down:
            return
        self.num_lost += 1
        process.incarnation += 1
        process.is_down = True
        requests = [process.current, *process.waiting, *process.unsent]
        process.current = None
        process.waiting.clear()
        process.unsent.clear()
        self._blocked.pop(process.id, None)
        self.model.lose(process.id)
        self._hear(Lost(process.id))
        for request in requests:
            if isinstance(request, Insert):
                process.unsent.append(request)
                self._blocked[process.id] = None
            elif request is not None:
                self._drop(request)
        self.clock.after(self.cluster.restart_seconds, lambda: self._replace(process))

    def _replace(self, process: SimulatedProcess) -> None:
        process.is_down = False
        self._hear(Ready(process.id))
        self._begin(process, process.incarnation)

    def _drop(self, request: CallRequest[Any]) -> None:
        self._hear(Dropped(request))
        dropped = set(request.results)
        for process in [
            self.processes[each] for each in self._blocked
        ]:  # what was to read its results will never be sent
            for other in [each for each in process.unsent if dropped & set(self.model.arguments(each))]:
                process.unsent.remove(other)
                self._drop(other)

    # --- Driving it ---

    def run_until(self, is_over: Callable[[], bool], most_events: int) -> bool:
        """Lets events happen until a condition holds; returns False if it doesn't within so many events."""
        last = self.clock.num_events + most_events
        while not is_over():
            if self.clock.num_events >= last or not self.clock.step():
                return False
        return True
