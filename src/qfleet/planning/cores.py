"""Simulated time, the CPU cores that tasks share, and the links between nodes."""

import heapq
from collections.abc import Callable


class Clock:
    """Lets events happen in the order of their times."""

    def __init__(self) -> None:
        """Begins at 0, without events."""
        self.now = 0.0
        """Time, in simulated seconds."""
        self.num_events = 0
        """Events that have happened."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_scheduled = 0

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Schedules an event."""
        self._num_scheduled += 1
        heapq.heappush(self._events, (self.now + seconds, self._num_scheduled, event))

    def step(self) -> bool:
        """Lets the next event happen; returns False if there is none."""
        if not self._events:
            return False
        self.now, _, event = heapq.heappop(self._events)
        self.num_events += 1
        event()
        return True


class Cores:
    """The cores of one node. Tasks that want more cores than there are share them evenly, as threads do.

    A task of width w counts as w threads. All threads run at the same rate, so one virtual time orders the ends of all
    tasks: it runs slower the more threads there are.
    """

    def __init__(self, clock: Clock, num_cores: float, speed: float = 1.0) -> None:
        """Has no tasks yet.

        Args:
          clock: the simulation's.
          num_cores: number of cores.
          speed: of each core, as a multiple of the speed of this machine's.
        """
        self._clock, self._num_cores, self._speed = clock, num_cores, speed
        self.busy_seconds = 0.0
        """Core-seconds that the cores have worked."""
        self._width = self._virtual = self._updated_at = 0.0
        self._tasks: list[tuple[float, int, float, Callable[[], None]]] = []
        self._num_tasks = self._plan = 0

    @property
    def are_busy(self) -> bool:
        """Whether none of them is idle."""
        return self._width > self._num_cores - 1

    def run(self, cpu_seconds: float, width: float, on_done: Callable[[], None]) -> None:
        """Begins a task.

        Args:
          cpu_seconds: its work, on a core of this machine.
          width: number of cores that share the work.
          on_done: called at its end.
        """
        self._update()
        self._width += width
        self._num_tasks += 1
        heapq.heappush(self._tasks, (self._virtual + cpu_seconds / width, self._num_tasks, width, on_done))
        self._schedule()

    def _rate(self) -> float:
        return min(1.0, self._num_cores / self._width) * self._speed

    def _update(self) -> None:
        passed, self._updated_at = self._clock.now - self._updated_at, self._clock.now
        if self._width > 1e-9:
            self._virtual += passed * self._rate()
            self.busy_seconds += passed * min(self._width, self._num_cores)

    def _schedule(self) -> None:
        self._plan += 1
        if self._tasks:
            plan, seconds = self._plan, max(0.0, self._tasks[0][0] - self._virtual) / self._rate()
            self._clock.after(seconds, lambda: self._end_first(plan))

    def _end_first(self, plan: int) -> None:
        if plan != self._plan:  # a task has begun or ended since
            return
        self._update()
        self._virtual, _, width, on_done = heapq.heappop(self._tasks)
        self._width = self._width - width if self._tasks else 0.0
        self._schedule()
        on_done()


class Link:
    """A node's connection to the network. It carries one transfer after the other in each direction."""

    def __init__(self, bytes_per_second: float) -> None:
        """Is free in both directions."""
        self.bytes_per_second = bytes_per_second
        self.sends_until = self.receives_until = 0.0
        """Times when it is free again."""
        self.busy_seconds = 0.0
        """Seconds of transfers, the longer of the two directions."""
        self._sent_seconds = self._received_seconds = 0.0

    @staticmethod
    def transfer(clock: Clock, source: "Link", target: "Link", num_bytes: int, latency_seconds: float) -> float:
        """Returns the seconds until a transfer that is asked for now has arrived, and occupies both links with it."""
        seconds = num_bytes / min(source.bytes_per_second, target.bytes_per_second)
        end = max(clock.now, source.sends_until, target.receives_until) + seconds
        source.sends_until = target.receives_until = end
        source._sent_seconds += seconds
        target._received_seconds += seconds
        for link in (source, target):
            link.busy_seconds = max(link._sent_seconds, link._received_seconds)
        return end - clock.now + latency_seconds
