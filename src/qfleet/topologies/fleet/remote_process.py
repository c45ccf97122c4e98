"""A process of a run on Ray: what runs in it, and the place that it holds as the supervisor knows it."""

import collections
import functools
import math
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import ray

from qfleet.runtime.devices import compute_in_line, use_cpu_only
from qfleet.topologies.fleet.calls import Call, Connection
from qfleet.topologies.fleet.channel import Welcome, serve
from qfleet.topologies.fleet.cluster import in_words, variables
from qfleet.topologies.fleet.references import Reference, dump, load

P = TypeVar("P")


class ProcessHost:
    """What Ray runs in a process: it makes an object of another class, and carries out the calls of its methods.

    It makes the object in a call of its own, not in its constructor. So a process whose object takes long to make, or
    hangs while it is made, has already said where it runs, and can be told from one that waits for a node.
    """

    def __init__(self, kind: type, arguments: tuple) -> None:
        """Remembers what to make; `arguments` are those of the constructor."""
        self._kind, self._arguments = kind, arguments
        self._object: Any = None

    def where(self) -> tuple[int, str]:
        """Returns process ID and node ID."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def make_object(self) -> None:
        """Makes the object."""
        self._object = self._kind(*self._arguments)

    def __getattr__(self, name: str) -> Any:
        """Returns a method of the object."""
        return getattr(self._object, name)

    def call(self, method: str, data: bytes, *values: Any) -> Any:
        """Calls a method, for `RayConnection`.

        Args:
          method: its name.
          data: its arguments, from `references.dump`.
          *values: the values that the references among the arguments refer to.

        Returns:
          The reply, from `references.dump`, and then the values of its references.
        """
        reply, results = dump(getattr(self, method)(*load(data, [Reference(value) for value in values])))
        return (reply, *(result.value for result in results)) if results else reply

    def serve(self, welcome: Welcome) -> None:
        """Carries out the calls that come through a channel, until its other end is closed."""
        serve(self, welcome)


class InRemoteProcess:
    """Base class of everything that runs in a remote process. It prepares the process before anything uses JAX.

    A subclass, such as `RemoteActor`, then makes the plain object that does the work, and holds it. Its methods have
    the names of the plain object's, and take and return references where those take and return large arrays.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Sets up the process, in which JAX must not have been used yet.

        Args:
          variables: environment variables to set first, because Ray may have started the process in advance.
        """
        os.environ.pop("OMP_NUM_THREADS", None)  # set by Ray to the number of CPUs that the process takes
        os.environ.update(variables)
        if variables.get("JAX_PLATFORMS") == "cpu":
            use_cpu_only()
        if variables.get("JAX_CPU_ENABLE_ASYNC_DISPATCH") == "false":
            compute_in_line()


class RemoteProcess(Generic[P]):
    """A place in the run, and the process that holds it at the moment. Its methods are those of `kind`."""

    def __init__(
        self,
        name: str,
        kind: type[P],
        arguments: tuple,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
        on_lost: Callable[[], None],
        on_ready: Callable[[], None] = lambda: None,
        *,
        inherits: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Describes the process; `start` starts it.

        Args:
          name: for messages.
          kind: class of the object that runs in the process.
          arguments: of its constructor.
          resources: that the process takes, by Ray's names.
          environment: environment variables to set in the process.
          on_lost: called when the process has been replaced, before the replacement gets its first request.
          on_ready: called when the process has found a node and its object has been made.
          inherits: whether Ray's processes inherit `variables` from this one. If not, Ray must set them, and takes
            twice as long to start a process.
          labels: that the node must have.
        """
        amounts = dict(resources)
        options: dict[str, Any] = {
            "num_cpus": amounts.pop("CPU", 0),
            "num_gpus": amounts.pop("GPU", 0),
            "resources": amounts,
        }
        if not inherits:
            options["runtime_env"] = {"env_vars": variables()}
        if labels:  # which an older Ray doesn't know
            options["label_selector"] = dict(labels)
        self.name, self.resources, self.labels = name, dict(resources), dict(labels or {})
        self._kind, self._options, self._arguments = kind, options, (dict(environment), *arguments)
        self.on_lost, self.on_ready = on_lost, on_ready
        self.calls: collections.deque[Call] = collections.deque()
        """Calls that have not been answered, in the order in which the process carries them out."""
        self.has_replied_to: set[str] = set()
        """Methods that the current process has replied to, and so has compiled."""
        self.replied_at = self.started_at = 0.0
        """Time of the last reply, or of the last moment when no reply could have arrived."""
        self.place: tuple[int, str] | None = None
        """Process ID and node ID; None until the process has started."""
        self.is_ready = False
        """Whether the process has a node and its object has been made."""
        self.failed_at: collections.deque[float] = collections.deque()
        """Times of the failures that still count."""
        self.handle: Any = None
        self.connection: Connection | None = None

    @property
    def wants(self) -> str:
        """What the process wants of a node, in words."""
        return in_words(self.resources, self.labels)

    def start(self, now: float) -> None:
        """Starts a process in this place; `now` is the time, in seconds."""
        self.place, self.is_ready, self.has_replied_to = None, False, set()
        self.started_at = self.replied_at = now
        self.handle = self._launch()

    def terminate(self, *, is_alive: bool = False) -> None:
        """Terminates the process.

        Args:
          is_alive: whether the process may still be at work, or be stopped so that it doesn't hear Ray. If it is on
            this node, it is then killed by a signal.
        """
        if self.handle is None:
            return
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        self._kill(is_alive=is_alive)
        self.handle = None

    @functools.cached_property
    def _make(self) -> Any:
        # `ps` and Ray's dashboard call a process by the name of this class.
        named = type(self._kind.__name__, (ProcessHost,), {})
        return ray.remote(named).options(**self._options)

    def _launch(self) -> Any:
        """Makes Ray start a process, and returns its handle."""
        return self._make.remote(self._kind, self._arguments)

    def _kill(self, *, is_alive: bool) -> None:
        """Kills the process that `handle` stands for."""
        ray.kill(self.handle)
        if is_alive and self.place is not None and self.place[1] == ray.get_runtime_context().get_node_id():
            try:
                os.kill(self.place[0], signal.SIGKILL)
            except ProcessLookupError:
                self.place = None


ONE_CPU = {"CPU": 1.0}
"""Resources that a process takes by default."""

ON_CPU = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1", "OMP_NUM_THREADS": "1"}
"""Environment variables of a process that computes on the CPU, with one thread."""

IN_LINE = {**ON_CPU, "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
"""Variables of such a process if it has nothing else to do while it computes."""


def default_resources(num_devices: int) -> dict[str, float]:
    """Returns the resources of a learner by default: a GPU for each of its devices, if the cluster has as many."""
    has_gpus = ray.cluster_resources().get("GPU", 0) >= num_devices
    return {**ONE_CPU, "GPU": num_devices} if has_gpus else ONE_CPU


def cpus_for(processes: list[Mapping[str, float]]) -> int:
    """Returns the number of CPUs that a local Ray must claim to have, so that all of these processes find a place."""
    return max(os.cpu_count() or 1, math.ceil(sum(resources.get("CPU", 0) for resources in processes)))
