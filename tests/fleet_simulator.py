"""A simulator of the processes of a fleet: director and supervisor are real, and the processes are objects here.

A `World` is a third carrier of calls, beside sockets and Ray. It has one thread, no process, no socket and no real
clock: time goes from one event to the next. Each process carries out its calls in order, and each call takes time. How
much is a parameter, and so is how far times are spread. By the spread, replies of several processes come in any order
that they could have in a real run. Everything random follows from a seed, so a seed that finds a fault replays it.

What a process does is a model: an object with the methods of the real class that are called, whose arrays are small
records that say where they come from. The modules `simulated_*` have the models, and for each topology a `Rig`: it
drives the director, and knows what must always hold. All that touches the inside of a director is there. What can go
wrong is in `simulated_faults`.
"""

import collections
import heapq
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from invariants import Violation, require

from qfleet.topologies.fleet.calls import Call, Failure, Reply, ValueIsLost
from qfleet.topologies.fleet.references import Reference, dump, load
from qfleet.topologies.fleet.remote_process import RemoteProcess

SECONDS = {"start": 2.0, "reply": 0.05, "turn": 0.02, "call": 0.5}
"""Time that things take: a process to start, a reply to arrive, the director to notice it, and a call. A method's own
name stands for that method."""

NOTHING: Mapping[str, float] = {}

LONGEST_FACTOR = 6.0
"""Largest factor by which chance makes something slower, so that a healthy process is never taken for a silent one."""


_TICK_SECONDS = 0.7
"""Longest time between two turns of the director. A real one takes a turn every 0.1 s."""


class Value:
    """Where the value of a reference lies."""

    __slots__ = ("is_lost", "node", "value")

    def __init__(self, value: Any, node: int | None) -> None:
        self.value, self.node, self.is_lost = value, node, False


class Host:
    """A process: it starts, and carries out its calls one by one until it ends."""

    def __init__(self, world: "World", name: str, make: Callable[["Host"], Any], node: int) -> None:
        self.world, self.name, self.node = world, name, node
        self.number = world.num_launched
        """Number of processes before it, in the whole world."""
        self.model: Any = None
        self._make, self._calls = make, collections.deque[Call]()
        self.connection: SimulatedConnection | None = None
        self._is_busy = self.is_placed = self.is_dead = self.is_stuck = False
        self._is_about_to_raise = self._has_raised = False
        self._unheard: list[list[Any]] = []
        """News on their way: each is a list of one, so that it can be taken out."""
        self._delay, self._heard_at = 0.0, 0.0
        self._inserted: list[tuple] = []
        world.after(world.seconds_of("start", name), self.start)

    def start(self) -> None:
        """Makes the object that does the work, if there is a place for it."""
        if self.is_dead:
            return
        if self.world.active < self.world.starved_until:
            self.world.after(1.0, self.start)
            return
        self.model = self._make(self)
        self._go_on()

    def receive(self, call: Call) -> None:
        """Takes a call."""
        self._calls.append(call)
        self._go_on()

    def _go_on(self) -> None:
        if self.model is None or self._is_busy or self.is_dead or self.is_stuck or not self._calls:
            return
        self._is_busy = True
        seconds = self.world.seconds_of(self._calls[0].method, self.name)
        self.world.after(seconds, self._finish)

    def _finish(self) -> None:
        if self.is_dead or self.is_stuck:
            return
        self._is_busy, call = False, self._calls.popleft()
        news: Reply | Failure
        if any(reference.place.is_lost for reference in call.references):
            news = Failure(call, "lost its arguments", ValueIsLost(), is_alive=True)
        elif self._is_about_to_raise:
            self._is_about_to_raise, self._has_raised = False, True
            news = Failure(call, "raised Bang", RuntimeError("bang"), is_alive=True)
        else:
            news = self._answer(call)
        self._say(news)
        self._go_on()

    def _answer(self, call: Call) -> Reply | Failure:
        try:
            data, results = dump(self._carry_out(call))
        except Violation:
            if not self._has_raised:
                raise
            return Failure(call, "raised another error", RuntimeError("bang"), is_alive=True)  # because of the first
        places = [Value(result.value, self.node) for result in results]
        self.world.values.extend(places)
        return Reply(call, data, places)

    def _carry_out(self, call: Call) -> Any:
        if call.method == "where":
            self.is_placed = True
            return (self.number, str(self.node))
        if call.method == "make_object":
            return None
        arguments = load(call.data, [Reference(reference.place.value) for reference in call.references])
        if call.method == "insert":
            self._inserted.append(arguments)
        return getattr(self.model, call.method)(*arguments)

    def _say(self, news: Reply | Failure) -> None:
        """Has news heard after a while. Sockets keep their order, and Ray doesn't."""
        world = self.world
        at = world.active + world.seconds_of("reply", self.name) + self._delay
        if world.is_one_machine:
            at = self._heard_at = max(at, self._heard_at)
        entry = [news]
        self._unheard.append(entry)

        def arrive() -> None:
            if entry:
                self._unheard.remove(entry)
                assert self.connection is not None
                world.hear(self.connection, entry[0])

        world.at(at, arrive)

    # --- Faults ---

    def die(self, *, is_heard: bool = True) -> None:
        """Ends: before, while or after it carries out a call, whose reply may be lost."""
        if self.is_dead:
            return
        random = self.world.random
        lost = [entry for entry in self._unheard if random.random() < 0.5]
        if self._is_busy and self._calls and not self.is_stuck and random.random() < 0.5:
            call = self._calls[0]
            if not any(reference.place.is_lost for reference in call.references):
                self._answer(call)  # its answer is never sent
        self.is_dead = True
        unanswered = [entry[0].call for entry in lost] + list(self._calls)
        for entry in lost:
            self._unheard.remove(entry)
            entry.clear()
        if not is_heard:
            return
        if self.world.is_one_machine:
            self._heard_at = 0.0  # what Ray says of it may overtake what came through the socket
            self._say(Failure(None, "died"))
        else:
            for call in unanswered:
                self._say(Failure(call, "died", RuntimeError("died")))

    def kill(self) -> None:
        """Ends soon. Until then it goes on, and its replies are those of an old incarnation."""
        require(
            "only a process that has failed is replaced", self.is_dead or self.is_stuck or self._has_raised, self.name
        )
        self.world.after(self.world.random.random(), self.die)

    def raise_soon(self) -> None:
        """Has its next call raise an error."""
        self._is_about_to_raise = True

    def delay(self, seconds: float) -> None:
        """Has all news of it arrive later from now on."""
        self._delay = seconds

    def repeat_insertion(self) -> None:
        """Carries out a call again that stores a chunk, as a network does that doesn't know whether a call arrived."""
        if self._inserted and not self.is_dead:
            self.model.insert(*self.world.random.choice(self._inserted))


class SimulatedConnection:
    """Carries the calls to one process."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sent: set[Call] = set()
        host.connection = self
        self.is_closed = False

    def send(self, call: Call) -> None:
        """Sends a call."""
        require("a call is sent once", call not in self._sent and not self.is_closed, call.method)
        self._sent.add(call)
        for reference in call.references:
            require("a call is sent when its arguments are there", reference.is_there, call.method)
            if reference.place is None:
                reference.place = Value(reference.value, None)
        if self._host.is_dead:
            if not self._host.world.is_one_machine:
                self._host._say(Failure(call, "died", RuntimeError("died")))
            return
        self._host.receive(call)

    def close(self) -> None:
        """Takes notice that nobody waits for the process any more. What it says is still put into the inbox."""
        self.is_closed = True


class SimulatedProcess(RemoteProcess):
    """A place in the run, whose processes are hosts in a world."""

    def __init__(self, world: "World", *arguments: Any, labels: Mapping[str, str] | None = None) -> None:
        super().__init__(*arguments, inherits=True, labels=labels)
        self._world = world

    def _launch(self) -> Host:
        return self._world.launch(self.name, self._kind, self._arguments[1:])

    def _kill(self, *, is_alive: bool) -> None:
        self.handle.kill()


class World:
    """Processes, the calls between them and the director, and time: a `calls.Carrier`, and a `calls.Inbox` as well."""

    def __init__(
        self,
        seed: int,
        *,
        is_one_machine: bool = True,
        num_nodes: int = 1,
        spread: float = 0.0,
        seconds: Mapping[str, float] = NOTHING,
        slow: Mapping[str, float] = NOTHING,
    ) -> None:
        """Has no processes yet.

        Args:
          seed: of everything random.
          is_one_machine: whether news keep their order, as those through sockets do, and no value is ever lost.
          num_nodes: nodes on which processes start.
          spread: standard deviation of the logarithm of all times; 0 for no chance.
          seconds: times, as in `SECONDS`, which has those that are not given.
          slow: factors of all times of single processes, by name.
        """
        self.random = random.Random(seed)
        self.is_one_machine, self._spread = is_one_machine, spread
        self._seconds, self._slow = {**SECONDS, **seconds}, slow
        self.models: dict[type, Callable[..., Any]] = {}
        """For each class of remote processes, its model. It is called with the host and the class's arguments."""
        self.nodes = list(range(num_nodes))
        self.hosts: list[Host] = []
        self.num_launched = 0
        self.values: collections.deque[Value] = collections.deque(maxlen=10_000)
        self.on_turn: Callable[[], None]
        """Lets the director deal with what is in the inbox."""
        self.active = 0.0
        """Time without the moments when the clock has jumped."""
        self._jumped, self.starved_until = 0.0, 0.0
        self.num_events = self._num_scheduled = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._news: list[tuple[Any, Reply | Failure]] = []
        self._has_turn_coming = False
        self.at(0.0, self._tick)

    # --- Time ---

    def clock(self) -> float:
        """Returns the time, in seconds."""
        return 1000.0 + self.active + self._jumped

    def seconds_of(self, what: str, name: str = "") -> float:
        """Returns how long something takes this time."""
        mean = self._seconds.get(what, self._seconds["call"]) * self._slow.get(name, 1.0)
        if not self._spread:
            return mean
        return mean * min(LONGEST_FACTOR, math.exp(self.random.gauss(0.0, self._spread)))

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Schedules an event."""
        self._num_scheduled += 1
        heapq.heappush(self._events, (time, self._num_scheduled, event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Schedules an event."""
        self.at(self.active + seconds, event)

    def step(self) -> None:
        """Lets the next event happen."""
        self.active, _, event = heapq.heappop(self._events)
        self.num_events += 1
        event()

    def run(self, until: Callable[[], bool], most_events: int, otherwise: str) -> None:
        """Lets events happen until a condition holds.

        Args:
          until: the condition.
          most_events: number of events within which it must hold.
          otherwise: the invariant that is violated if it doesn't.
        """
        last = self.num_events + most_events
        while not until():
            require(otherwise, self.num_events < last, f"not within {most_events} events")
            self.step()

    def run_for(self, seconds: float) -> None:
        """Lets everything happen that happens within so many seconds."""
        end = self.active + seconds
        while self.active < end:
            self.step()

    def jump(self, seconds: float) -> None:
        """Stops everything for a while, as a computer does that is suspended; only the clock goes on."""
        self._jumped += seconds

    def _tick(self) -> None:
        self.after(_TICK_SECONDS, self._tick)
        self._turn()

    def _turn(self) -> None:
        self._has_turn_coming = False
        self.on_turn()

    # --- A carrier ---

    def connect(self, handle: Host) -> SimulatedConnection:
        """Returns a connection to a process."""
        return SimulatedConnection(handle)

    def read(self, place: Value) -> Any:
        """Returns a value, or raises `ValueIsLost`."""
        if place.is_lost:
            raise ValueIsLost("its node has left")
        return place.value

    def is_lost(self, place: Value) -> bool:
        """Returns whether a value is lost."""
        return place.is_lost

    def close(self) -> None:
        """Does nothing."""

    # --- An inbox ---

    def hear(self, connection: SimulatedConnection, news: Reply | Failure) -> None:
        """Puts news into the inbox, and has the director look after them soon."""
        if connection.is_closed and self.random.random() < 0.5:
            return
        self._news.append((connection, news))
        if not self._has_turn_coming:
            self._has_turn_coming = True
            self.after(self.seconds_of("turn"), self._turn)

    def take(self) -> list[tuple[Any, Reply | Failure]]:
        """Returns all news."""
        news, self._news = self._news, []
        return news

    def wait(self, seconds: float) -> None:
        """Does nothing: there is nobody else who could do something meanwhile."""

    def wake(self) -> None:
        """Does nothing."""

    # --- Processes ---

    def launch(self, name: str, kind: type, arguments: tuple) -> Host:
        """Starts a process."""
        model = self.models[kind]
        host = Host(self, name, lambda host: model(host, *arguments), self.random.choice(self.nodes))
        self.num_launched += 1
        self.hosts = [each for each in self.hosts if not each.is_dead]
        self.hosts.append(host)
        return host

    def host(self, name: str) -> Host:
        """Returns the newest process of a name."""
        return next(host for host in reversed(self.hosts) if host.name == name)

    def lose_node(self, node: int) -> None:
        """Has a node leave, with its processes and all values that it keeps."""
        for host in self.hosts:
            if host.node == node:
                host.die()
        for value in self.values:
            if value.node == node:
                value.is_lost = True
