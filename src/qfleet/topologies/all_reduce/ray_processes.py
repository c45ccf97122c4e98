"""The processes of an all-reduce run on a Ray cluster, each started by an actor on the node that Ray chose for it.

Ray only finds the places, and carries signs of life and progress, a few hundred bytes each. What the processes exchange
while they learn goes between them directly.
"""

import collections
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qfleet.config import AllReduceConfig, ConfigError
from qfleet.topologies.all_reduce.processes import Child, Peer, PeerLost, Processes, fate_of, free_port, share_cores
from qfleet.topologies.fleet.cluster import connected, in_words, last_line, room, variables

_LISTEN_SECONDS = 0.2
"""That an actor waits for its process to report, before it hears of anything else."""

_KILL_SECONDS = 10
"""For actors to end their processes, after which they are ended themselves, and their processes with them."""


class _Place(NamedTuple):
    """Where a process is to be started."""

    node: str
    address: str
    port: int
    """A free one."""
    report_descriptor: int
    python: str
    sees_folder: bool


class _Report(NamedTuple):
    """What has come of a process since the report before."""

    data: bytes
    is_last: bool
    code: int | None


class _Host:
    """The actor: runs one process on the node that it is on."""

    def __init__(self) -> None:
        self._child = Child()
        self._is_heard_out = False

    def place(self, folder: str) -> _Place:
        return _Place(
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
            free_port(""),
            self._child.report_descriptor,
            sys.executable,
            os.path.isdir(folder),
        )

    def start(self, command: list[str], variables: dict[str, str], num_here: int, log: str, folder: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # Ray's: 1
        environment |= variables
        path = [variables["PYTHONPATH"], os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        share_cores(environment, num_here)  # but bind it to none: on nodes of Ray others may work too
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's is inherited, and blocks signals
        try:
            self._child.start(command, environment, Path(log), folder if os.path.isdir(folder) else None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def read(self, seconds: float) -> _Report:
        data = b""
        if self._is_heard_out:
            self._child.wait(seconds)
        elif select.select([self._child], [], [], seconds)[0]:
            data = self._child.read()
            self._is_heard_out = not data
        return _Report(data, self._is_heard_out, self._child.poll())

    def ask_to_stop(self) -> None:
        self._child.ask_to_stop()

    def kill(self) -> None:
        self._child.kill()


@contextlib.contextmanager
def on_ray(
    config: AllReduceConfig, make_command: Callable[[Peer], list[str]], log_folder: Path
) -> Iterator[Callable[[], Processes]]:
    """Yields what makes processes on a Ray cluster, while this process is connected to it.

    Where it is connected to one already, that one is used, and stays.

    Args: as for the launcher.

    Raises:
      ConfigError: if there is no cluster at the address.
    """
    assert config.ray_address is not None
    num_made = 0

    def make() -> Processes:
        nonlocal num_made
        num_made += 1
        return _RayProcesses(config, make_command, log_folder, is_first=num_made == 1)

    with connected(config.ray_address, config.num_processes, "ray_address"):
        yield make


class _RayProcesses:
    """All processes of a run, placed by Ray."""

    def __init__(
        self, config: AllReduceConfig, make_command: Callable[[Peer], list[str]], log_folder: Path, is_first: bool
    ) -> None:
        self._config, self._make_command, self._log_folder = config, make_command, log_folder.absolute()
        self._is_first = is_first
        self._group: PlacementGroup | None = None
        self._hosts: list[Any] = []
        self._places: list[_Place] = []
        self._reports: dict[Any, int] = {}  # that are to come, by their references
        self._heard_out: set[int] = set()
        self._codes: dict[int, int | None] = {}
        self._losses: dict[int, str] = {}

    def start(self, must_stop: Callable[[], bool]) -> None:
        self._reserve(must_stop)
        self._places = self._all("place", [(str(self._log_folder),)] * len(self._hosts), must_stop)
        for place in self._places:
            if not place.sees_folder:
                raise ConfigError(
                    f"a run's folder must be on a file system that all nodes of the Ray cluster see, got "
                    f"{self._log_folder.parent}, which node {place.address} lacks; give another --run-dir"
                )
        first = self._places[0]
        host = f"[{first.address}]" if ":" in first.address else first.address
        num_on = collections.Counter(place.node for place in self._places)
        arguments = []
        for i, place in enumerate(self._places):
            peer = Peer(i, f"{host}:{first.port}", place.report_descriptor, place.python)
            log = str(self._log_folder / f"{i}.log")
            arguments.append((self._make_command(peer), variables(), num_on[place.node], log, os.getcwd()))
        self._all("start", arguments, must_stop)
        for i in range(len(self._hosts)):
            self._codes[i] = None
            self._listen(i)

    def _reserve(self, must_stop: Callable[[], bool]) -> None:
        """Reserves a place for each process, on as many nodes as there are, and has actors started there."""
        patience, num_gpus = self._config.silence_seconds, 0
        if ray.cluster_resources().get("GPU", 0) and os.environ.get("JAX_PLATFORMS") != "cpu":
            num_gpus = self._config.devices_per_process
        bundle = {"CPU": 1, "GPU": num_gpus} if num_gpus else {"CPU": 1}
        self._group = placement_group([bundle] * self._config.num_processes, strategy="SPREAD")
        deadline = time.monotonic() + patience
        while not self._group.wait(_LISTEN_SECONDS):
            if must_stop():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise (ConfigError if self._is_first else PeerLost)(
                    f"a Ray cluster must have room for num_processes={self._config.num_processes} times "
                    f"{in_words(bundle)}, got {room(bundle)} for {patience:g} s; add nodes, or give a smaller "
                    f"--num-processes"
                )
        for i in range(self._config.num_processes):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i)
            host = ray.remote(_Host).options(num_cpus=1, num_gpus=num_gpus, scheduling_strategy=strategy)
            self._hosts.append(host.remote())

    def _all(self, method: str, arguments: list[tuple], must_stop: Callable[[], bool]) -> list[Any]:
        """Returns what a method of each actor returns for its arguments."""
        references = [getattr(host, method).remote(*each) for host, each in zip(self._hosts, arguments, strict=True)]
        deadline = time.monotonic() + self._config.silence_seconds
        while ray.wait(references, num_returns=len(references), timeout=_LISTEN_SECONDS)[1]:
            if must_stop():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise PeerLost(f"a Ray actor didn't answer for {self._config.silence_seconds:g} s")
        try:
            return ray.get(references)
        except ray.exceptions.RayError as error:
            # One of these came from what we have it do; the others are of a node or an actor that died meanwhile.
            is_raised = isinstance(error, ray.exceptions.RayTaskError) or getattr(error, "_actor_init_failed", False)
            if is_raised and self._is_first:
                raise ConfigError(
                    f"every node of the Ray cluster must be able to run this qfleet, and one isn't "
                    f"({last_line(error)}); install the same version on all, in the environment that Ray runs in"
                ) from error
            raise PeerLost(f"a Ray actor could not start a process ({last_line(error)})") from error

    def _listen(self, i: int) -> None:
        self._reports[self._hosts[i].read.remote(_LISTEN_SECONDS)] = i

    def read(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        ready, others = ray.wait(list(self._reports), timeout=seconds) if self._reports else ([], [])
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        for reference in ready:
            i = self._reports.pop(reference)
            try:
                report: _Report = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lose(i, error)
                continue
            self._codes[i] = report.code
            if report.is_last:
                self._heard_out.add(i)
            if not report.is_last or report.code is None:
                self._listen(i)
            if report.data:
                yield i, report.data

    def _lose(self, i: int, error: Exception) -> None:
        # Of an actor that dies alone its node tells at once; of a node that dies nobody does at first.
        is_unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        has_node = any(node["NodeID"] == self._places[i].node and node["Alive"] for node in ray.nodes())
        is_alone = has_node and not is_unreachable
        self._losses[i] = "was lost with its Ray actor" if is_alone else "was lost with its node, or the way to it"
        self._codes[i] = -signal.SIGKILL
        self._heard_out.add(i)

    def are_heard_out(self) -> bool:
        return len(self._heard_out) == len(self._hosts)

    def codes(self) -> dict[int, int | None]:
        return self._codes

    def name(self, number: int) -> str:
        return f"process {number} of {self._config.num_processes} on {self._places[number].address}"

    def fate(self, number: int) -> str:
        return self._losses.get(number) or fate_of(self._codes[number])

    def ask_to_stop(self) -> None:
        for host in self._hosts:
            host.ask_to_stop.remote()

    def kill(self) -> None:
        ends = [host.kill.remote() for i, host in enumerate(self._hosts) if i not in self._losses]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=_KILL_SECONDS)
        while self._hosts:
            ray.kill(self._hosts.pop())
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self._reports.clear()
